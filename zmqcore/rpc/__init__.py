"""The RPC layer, in pure Python: clients, servers, deadlines, errors across the wire."""
