"""What these tests call in processes of their own, or import once they know that Triton is there."""

collect_ignore = ["on_triton.py", "typed.py"]
