from zmqcore._msgpack cimport Limits


cdef object decoded(object body, object buffers, const Limits* limits, object codec)
