"""The benchmark: our engines against the peers, on the same work, in the same run.

``python -m fastwm bench`` is the way in (:mod:`fastwm.bench.cli`). The way of the data::

    cli        arguments -> plan; one process per thread count
    runner     per configuration: build every provider, check parity, time in turns, write rows
    providers  one entry per way of doing the same rollout; a new engine is one line there
    rows       what is recorded, and its schema; plots and tables are made from rows only

Of the rest, only the demo imports it: how to time in turns, compare and name the conditions.
"""
