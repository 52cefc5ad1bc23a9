# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""Small messages that leave a socket together, as one message part of libzmq.

libzmq, the kernel and whoever receives take one message of 64 KiB with a fraction of the work that 64 of 1 KiB are. So
where messages come one right after the other they are *held*, and handed over together: by whoever sent them, before
it waits or looks; when there is no room for more; and after HOLD at the latest by a thread of this module, which needs
neither the GIL nor anything of Python. It sleeps unless something is held, and exists only while a socket is open that
has held something.

What is held counts as sent: it has its number, and is in the window.

The lock of the socket is held wherever nothing else is said. The list of the outboxes that hold something has a lock of
its own, which is taken after the socket's, never before it.
"""

cimport cython
from libc.errno cimport EINTR, ENOMEM
from libc.stddef cimport size_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from zmqcore._libzmq cimport ZMQ_DONTWAIT, ZMQ_SNDMORE, libzmq, zc_msg_t
from zmqcore._socket cimport SharedSocket, fork_generation, wake_by

cdef extern from *:
    """
    #include <pthread.h>
    #include <stdlib.h>
    #include <signal.h>
    #include <time.h>

    #define ZC_HOLD_NS 250000           /* HOLD: how long a message is held at most, and the pause between two rounds */
    #define ZC_IDLE_ROUNDS 20           /* after so many in which nothing was held the thread sleeps until woken */

    static pthread_mutex_t zc_list_lock = PTHREAD_MUTEX_INITIALIZER;
    static pthread_cond_t zc_list_changed = PTHREAD_COND_INITIALIZER;   /* for the thread, if it is asleep */
    static pthread_cond_t zc_flushed = PTHREAD_COND_INITIALIZER;        /* for who waits until `zc_current` is done */
    static zc_held *zc_first, *zc_last, *zc_current;
    static int zc_asleep, zc_n_counted, zc_run;     /* zc_run: odd while the thread exists; changes when it shall end */
    static pthread_t zc_thread;
    static void (*zc_flush)(void *);

    /* Blocks of ZC_BLOCK_BYTES that libzmq has sent are kept for the next ones, a few at most: malloc gives memory of
       that size back to the kernel, and taking it anew costs 16 page faults each time. */
    #define ZC_BLOCK_BYTES 65536        /* BATCH_BYTES */
    #define ZC_BLOCKS_KEPT 16
    static void *zc_blocks[ZC_BLOCKS_KEPT];
    static void *zc_block_take(void) {
        void *block = NULL;
        int i;
        for (i = 0; i < ZC_BLOCKS_KEPT && block == NULL; i++)
            block = __atomic_exchange_n(&zc_blocks[i], NULL, __ATOMIC_ACQUIRE);
        return block;
    }
    static void zc_block_keep(void *block) {
        int i;
        for (i = 0; i < ZC_BLOCKS_KEPT && block != NULL; i++)
            block = __atomic_exchange_n(&zc_blocks[i], block, __ATOMIC_ACQ_REL);
        free(block);
    }
    /* The free function of what libzmq was given; `capacity` are the bytes of its memory. On a thread of libzmq. */
    static void zc_sent(void *data, void *capacity) {
        if ((size_t)capacity == ZC_BLOCK_BYTES) zc_block_keep(data); else free(data);
    }
    /* Who has the socket's lock may ask: if it is being flushed just now, that waits for this lock. */
    static int zc_is_listed(zc_held *held) { return __atomic_load_n(&held->listed, __ATOMIC_RELAXED); }
    static void zc_set_listed(zc_held *held, int listed) { __atomic_store_n(&held->listed, listed, __ATOMIC_RELAXED); }
    static zc_held *zc_pop(void) {
        zc_held *first = zc_first;
        if (first != NULL) {
            zc_first = first->next;
            if (zc_first == NULL) zc_last = NULL;
            first->next = NULL;
            zc_set_listed(first, 0);
        }
        return first;
    }
    static void zc_remove(zc_held *held) {
        zc_held **at = &zc_first, *before = NULL;
        while (*at != NULL && *at != held) { before = *at; at = &(*at)->next; }
        if (*at == NULL) return;
        *at = held->next;
        if (zc_last == held) zc_last = before;
        held->next = NULL;
        zc_set_listed(held, 0);
    }
    static void *zc_flush_rounds(void *run) {
        const struct timespec pause = {0, ZC_HOLD_NS};
        zc_held *held, *last;
        int idle = 0;
        pthread_mutex_lock(&zc_list_lock);
        while ((int)(intptr_t)run == zc_run) {
            if (zc_first != NULL) idle = 0;
            else if (++idle > ZC_IDLE_ROUNDS) {
                zc_asleep = 1;
                pthread_cond_wait(&zc_list_changed, &zc_list_lock);
                if ((int)(intptr_t)run == zc_run) zc_asleep = 0;       /* else it is the next thread's */
                continue;
            }
            pthread_mutex_unlock(&zc_list_lock);
            nanosleep(&pause, NULL);
            pthread_mutex_lock(&zc_list_lock);
            for (last = zc_last, held = NULL; last != NULL && held != last && (held = zc_pop()) != NULL; ) {
                zc_current = held;
                pthread_mutex_unlock(&zc_list_lock);
                zc_flush(held->outbox);
                pthread_mutex_lock(&zc_list_lock);
                zc_current = NULL;
                pthread_cond_broadcast(&zc_flushed);
                if ((int)(intptr_t)run != zc_run) break;
            }
        }
        pthread_mutex_unlock(&zc_list_lock);
        return NULL;
    }
    /* Start the thread, with all signals blocked: they are for the interpreter's threads. The list's lock is held. */
    static int zc_start(void) {
        sigset_t all, before;
        int code;
        zc_run++;
        zc_asleep = 0;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        code = pthread_create(&zc_thread, NULL, zc_flush_rounds, (void *)(intptr_t)zc_run);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (code != 0) zc_run++;
        return code;
    }
    static void zc_forget_in_child(void) {
        pthread_mutex_init(&zc_list_lock, NULL);
        pthread_cond_init(&zc_list_changed, NULL);
        pthread_cond_init(&zc_flushed, NULL);
        zc_first = zc_last = zc_current = NULL;
        zc_asleep = zc_n_counted = 0;
        zc_run += zc_run & 1;
    }
    static int zc_list_begin(void (*flush)(void *)) {
        zc_flush = flush;
        return pthread_atfork(NULL, NULL, zc_forget_in_child);
    }
    /* Have `held` flushed soon. Returns 0, or an errno if there is no thread that could. */
    static int zc_list(zc_held *held) {
        int code = 0;
        pthread_mutex_lock(&zc_list_lock);
        if (!held->counted) {
            held->counted = 1;
            zc_n_counted++;
        }
        if (!(zc_run & 1)) code = zc_start();
        if (code == 0) {
            zc_set_listed(held, 1);
            held->next = NULL;
            if (zc_last == NULL) zc_first = held; else zc_last->next = held;
            zc_last = held;
            if (zc_asleep) pthread_cond_signal(&zc_list_changed);
        }
        pthread_mutex_unlock(&zc_list_lock);
        return code;
    }
    /* Take `held` out of everything; the thread ends with the last one. */
    static void zc_unlist(zc_held *held) {
        pthread_t thread;
        int last;
        pthread_mutex_lock(&zc_list_lock);
        zc_remove(held);
        while (zc_current == held) pthread_cond_wait(&zc_flushed, &zc_list_lock);
        last = held->counted && --zc_n_counted == 0 && (zc_run & 1);
        held->counted = 0;
        if (last) {
            thread = zc_thread;
            zc_run++;
            pthread_cond_signal(&zc_list_changed);
        }
        pthread_mutex_unlock(&zc_list_lock);
        if (last) pthread_join(thread, NULL);
    }
    """
    void *zc_block_take() noexcept nogil
    void zc_sent(void *data, void *capacity) noexcept nogil
    int zc_is_listed(zc_held *held) noexcept nogil
    int zc_list_begin(void (*flush)(void *) noexcept nogil) noexcept nogil
    int zc_list(zc_held *held) noexcept nogil
    void zc_unlist(zc_held *held) noexcept nogil

__all__ = ["Outbox"]

# What is held is given to libzmq as it is from so many bytes on, and copied below that.
cdef size_t GIVEN_BYTES = 8192


cdef void _flush_held(void *address) noexcept nogil:
    """For the thread, which has listed the outbox: it lives until this is done."""
    (<Outbox>address).shared.lock.acquire()
    if (<Outbox>address).n_bytes:
        (<Outbox>address).flush()
        if (<Outbox>address).watcher_fd >= 0 and (<Outbox>address).shared.is_ready():
            wake_by((<Outbox>address).watcher_fd)
    (<Outbox>address).shared.lock.release()


if zc_list_begin(_flush_held) != 0:
    raise MemoryError("no memory for a handler of fork(2)")


@cython.final
@cython.no_gc       # the thread may use it until it is freed: nothing of it is cleared before that
cdef class Outbox:
    """What is held for one socket, and there for one destination at a time."""

    def __init__(self, SharedSocket shared not None):
        self.shared = shared
        self.held.outbox = <void *>self
        self.watcher_fd = -1

    def __dealloc__(self):
        self.close()
        free(self.data)

    cdef bint takes(self, size_t size) noexcept nogil:
        """Whether there is room for an envelope of ``size`` bytes with those that are held."""
        return self.n_bytes + size <= BATCH_BYTES and self.n_messages < MOST_HELD_MESSAGES

    cdef int address(self, const char *routing_id, size_t size) noexcept:
        """What is held from now on is for the peer with this routing id of at most 255 bytes. Nothing is held now."""
        memcpy(self.routing_id, routing_id, size)
        self.routing_bytes = size
        return 0

    cdef int add(self, const unsigned char *envelope, size_t size) except -1:
        """Hold a copy of ``envelope``, for which takes() says that there is room."""
        if self.n_bytes + size > self.capacity:
            self._grow(self.n_bytes + size)
        if not zc_is_listed(&self.held) and zc_list(&self.held) != 0:
            raise MemoryError("no thread can be started to send what is held")
        memcpy(self.data + self.n_bytes, envelope, size)
        self.n_bytes += size
        self.n_messages += 1
        return 0

    cdef int flush(self) noexcept nogil:
        """Hand what is held to libzmq. Return 0, or an errno.

        On ENOMEM it is still held; on another one, also in ``failed``, it has been dropped.
        """
        cdef zc_msg_t head, body
        cdef int code = 0
        if self.n_bytes == 0:
            return 0
        if not self._pack(&head, &body):
            return ENOMEM
        # Before they are sent: who has seen them finds them counted.
        self.n_batches += 1
        self.n_batched += self.n_messages
        if self.routing_bytes:
            code = _send(&head, self.shared.handle, ZMQ_DONTWAIT | ZMQ_SNDMORE)
        if code == 0:
            code = _send(&body, self.shared.handle, ZMQ_DONTWAIT)
        else:
            libzmq.msg_close(&body)
        if code != 0:
            self.failed = code
            self.n_failed += self.n_messages
        self.n_bytes = 0
        self.n_messages = 0
        return code

    cdef bint _pack(self, zc_msg_t *head, zc_msg_t *body) noexcept nogil:
        """Make messages of what is held and, if it is for one peer of many, of its routing id. Return False without
        memory."""
        if self.routing_bytes:
            if libzmq.msg_init_size(head, self.routing_bytes) != 0:
                return False
            memcpy(libzmq.msg_data(head), self.routing_id, self.routing_bytes)
        if self.n_bytes >= GIVEN_BYTES:
            # libzmq gets the memory itself: to copy as much would take longer than to get some anew.
            if libzmq.msg_init_data(body, self.data, self.n_bytes, zc_sent, <void *>self.capacity) == 0:
                self.data = NULL
                self.given = self.capacity
                self.capacity = 0
                return True
        elif libzmq.msg_init_size(body, self.n_bytes) == 0:
            memcpy(libzmq.msg_data(body), self.data, self.n_bytes)
            return True
        if self.routing_bytes:
            libzmq.msg_close(head)
        return False

    cdef int close(self) except -1:
        """Drop what is held; nothing more will be. Not under the lock."""
        if self.held.counted and self.shared.generation == fork_generation():
            with nogil:
                zc_unlist(&self.held)
        return 0

    cdef int _grow(self, size_t size) except -1:
        cdef size_t capacity = 4096
        cdef unsigned char *data = NULL
        while capacity < size:
            capacity *= 2
        if self.data == NULL and capacity < self.given:
            capacity = self.given       # as much as the last time, when the messages came as closely
            self.given = 0
        if self.data == NULL and capacity == BATCH_BYTES:
            data = <unsigned char *>zc_block_take()
        if data == NULL:
            data = <unsigned char *>realloc(self.data, capacity)
        if data == NULL:
            raise MemoryError(f"no memory for {capacity} bytes of messages that are held")
        self.data = data
        self.capacity = capacity
        return 0


cdef int _send(zc_msg_t *message, void *socket, int flags) noexcept nogil:
    """Send one part without blocking. Return 0, or libzmq's errno: the part is closed then."""
    cdef int code
    while libzmq.msg_send(message, socket, flags) < 0:
        code = libzmq.get_errno()
        if code != EINTR:
            libzmq.msg_close(message)
            return code
    return 0
