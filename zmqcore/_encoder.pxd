from zmqcore._msgpack cimport Limits


cdef bytes encoded(object value, list buffers, const Limits* limits)
