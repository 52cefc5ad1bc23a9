"""``zmqcore bench``: what zmqcore costs on the user's machine, beside bare pyzmq."""
