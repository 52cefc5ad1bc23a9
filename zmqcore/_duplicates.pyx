# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""Which messages with an identity have come already, and which of them are finished.

Such a message may come twice, on another connection too. Of each sender the last WINDOW_MESSAGES are remembered, as
a ring of bits like that of RFC 6479. All of this belongs to one port, and is used under its lock.
"""

cimport cython
from libc.stdint cimport int64_t, uint64_t

from zmqcore._socket cimport coarse_now_ns

__all__ = []

cdef enum:
    # Of one sender, at least WINDOW_MESSAGES = 8192 are remembered (see the protocol), in words of 64 bits. One word
    # more, because words are cleared as a whole.
    WINDOW_WORDS = 129

# Beyond this number of senders the longest silent ones are forgotten.
cdef Py_ssize_t SENDERS_KEPT = 4096


cdef inline Py_ssize_t _word(uint64_t sequence) noexcept nogil:
    return (sequence >> 6) % WINDOW_WORDS


cdef inline uint64_t _bit(uint64_t sequence) noexcept nogil:
    return <uint64_t>1 << (sequence & 63)


@cython.final
cdef class Sender:
    """Which messages of one sender have come, and which are finished."""

    cdef bint take(self, uint64_t sequence) noexcept:
        """Note that message ``sequence`` has come; return whether it had come before."""
        cdef bint known
        self._advance(sequence)
        if not self._is_known(sequence):
            return False        # so old that nobody can tell: rather twice than never. No client of ours sends such
        known = self.taken[_word(sequence)] & _bit(sequence) != 0
        self.taken[_word(sequence)] |= _bit(sequence)
        return known

    cdef bint is_finished(self, uint64_t sequence) noexcept:
        return self._is_known(sequence) and self.finished[_word(sequence)] & _bit(sequence) != 0

    cdef int finish(self, uint64_t sequence) noexcept:
        if self._is_known(sequence):
            self.finished[_word(sequence)] |= _bit(sequence)
        return 0

    cdef int note_again(self, uint64_t sequence, request) except -1:
        """``request`` has come again, and the first one is not finished."""
        if self.again is None:
            self.again = {}
        self.again.setdefault(sequence, []).append(request)
        return 0

    cdef int _advance(self, uint64_t sequence) noexcept:
        """Make room for ``sequence``: forget what is too far behind it."""
        cdef uint64_t word, words, i
        if sequence > self.highest:
            words = (sequence >> 6) - (self.highest >> 6)
            for i in range(min(words, <uint64_t>WINDOW_WORDS)):
                word = ((self.highest >> 6) + 1 + i) % WINDOW_WORDS
                self.taken[word] = self.finished[word] = 0
            self.highest = sequence
        return 0

    cdef bint _is_known(self, uint64_t sequence) noexcept:
        """Whether ``sequence`` is not too far behind for its bits to mean anything."""
        return (self.highest >> 6) - (sequence >> 6) < WINDOW_WORDS


@cython.final
cdef class Senders:
    """Those who have sent messages with an identity, by the names in there."""

    def __cinit__(self):
        self.by_name = {}

    cdef Sender find(self, uint64_t name):
        """Return what is known of the sender of this name."""
        cdef Sender sender = self.last
        if sender is None or sender.name != name:
            sender = self.by_name.get(name)
            if sender is None:
                if len(self.by_name) >= SENDERS_KEPT:
                    self.forget(0)
                sender = Sender.__new__(Sender)
                sender.name = name
                self.by_name[name] = sender
            self.last = sender
        sender.last_seen = coarse_now_ns()
        return sender

    cdef int forget(self, int64_t silent_for) except -1:
        """Forget who has been silent for so long, in ns; with 0, the longest silent quarter."""
        cdef Sender sender
        cdef int64_t before = coarse_now_ns() - silent_for
        if silent_for == 0:
            seen = sorted([(<Sender>known).last_seen for known in self.by_name.values()])
            before = seen[len(seen) // 4] + 1
        for sender in list(self.by_name.values()):
            if sender.last_seen < before:
                del self.by_name[sender.name]
        if self.last is not None and self.last.name not in self.by_name:
            self.last = None
        return 0
