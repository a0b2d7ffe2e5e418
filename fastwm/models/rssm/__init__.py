"""PlaNet and the Dreamers: recurrent state-space models, made of torchrl's own modules.

How one is put together and trained, from another file::

    family = dreamer_v1(base_env)                        # or planet, dreamer_v2, dreamer_v3

    # real data: rows that say what led to each observation, an episode's first one included
    env = family.real_env(base_env)                      # is_init, state, belief, previous_action
    with torch.no_grad():
        data = env.rollout(200, family.actor())          # or a collector with that policy; [T]
    buffer.extend(insert_resets(data))

    # world model: sequences [B, T], which may cross episodes
    losses, batch = family.loss(buffer.sample().reshape(B, T))
    sum(losses.values()).backward()                      # parameters: family.loss.parameters()

    # dreams, from every posterior of the batch (detached)
    start = batch["next"].select("state", "belief").flatten(0, 1)          # [B * T]
    dream = family.env(base_env).rollout(
        15, family.policy, tensordict=start, break_when_any_done=False
    )                                                                      # [B * T, 15]
    values = family.value(dream["next"])["state_value"]  # then lambda returns and losses

``dream["next", "reward"]`` carries gradients through the dynamics to the policy: hold the world
model's parameters fixed with ``torchrl.objectives.utils.hold_out_net(family.loss)`` around the rollout.

The way of the data::

    keys         names of latents, action and embedding: torchrl's
    prior        torchrl's priors, for any batch
    observation  encoder and decoder, for vectors and images
    sequence     a batch of sequences as actions of an internal env
    posterior    `RSSMRollout`: prior and posterior along sequences
    rows         `insert_resets`: from transitions to what is trained on
    filter       `RSSMFilter`: the same for one step of a real env
    family       `RSSMFamily`: all of it around a prior and a posterior
    gaussian, categorical      the two kinds of state
    loss, categorical_loss     their losses
    planet, dreamer_v1, dreamer_v2, dreamer_v3     the builders
"""
