"""``zmqcore demo``: the main job on real input, each result checked. :mod:`.command` is the way in."""
