/*
 * The floor: what libzmq itself does on this machine, with nothing of Python in the way.
 *
 *   floor LIBZMQ server ENDPOINT     one ROUTER: echoes calls, counts one-way messages
 *   floor LIBZMQ client ENDPOINT...  DEALERs: runs the tasks named on its standard input
 *
 * Both speak the line protocol of peer.py: one command per line on stdin, one JSON object per line on stdout, and they
 * end when stdin does. LIBZMQ is the library that pyzmq has loaded, so that all peers of one run measure the same
 * libzmq; its few functions are declared here and resolved with dlsym, so no header of libzmq is needed.
 *
 *   call SIZE SECONDS                one call after the other
 *   inflight SIZE SECONDS DEPTH      DEPTH calls outstanding
 *   cast SIZE SECONDS                one way; timed from the first send to the last message counted at the server
 *   threads SIZE SECONDS THREADS     sequential calls, THREADS threads with a DEALER each (a socket cannot be shared)
 *   fanout SIZE SECONDS              one way, each message to every ENDPOINT
 *   open SIZE 0 COUNT                one call to each of COUNT addresses of the server, by a DEALER each, which is kept
 *   kept SIZE SECONDS                calls on these in turn
 *   shut 0 0                         close them
 *   new SIZE SECONDS COUNT           calls to COUNT addresses in turn, with a DEALER for each call
 *   cpu                              CPU seconds this process has used so far
 *
 * All waiting is libzmq's own blocking send and receive. Payload: byte 0 is the kind, bytes 8..15 a sequence number
 * that every answer is checked against.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

/* -- libzmq, as far as it is needed here -------------------------------------------------------------------------- */

enum { ZMQ_DEALER = 5, ZMQ_ROUTER = 6, ZMQ_LINGER = 17, ZMQ_LAST_ENDPOINT = 32, ZMQ_SNDMORE = 2 };

typedef union {                 /* libzmq's ABI: 64 opaque bytes, aligned like a pointer */
    unsigned char opaque[64];
    void *alignment;
} msg_t;

static void *(*ctx_new)(void);
static void *(*new_socket)(void *, int);
static int (*set_option)(void *, int, const void *, size_t);
static int (*get_option)(void *, int, void *, size_t *);
static int (*zbind)(void *, const char *);
static int (*zconnect)(void *, const char *);
static int (*zclose)(void *);
static int (*msg_init)(msg_t *);
static int (*msg_init_size)(msg_t *, size_t);
static int (*msg_init_data)(msg_t *, void *, size_t, void (*)(void *, void *), void *);
static int (*msg_send)(msg_t *, void *, int);
static int (*msg_recv)(msg_t *, void *, int);
static int (*msg_close)(msg_t *);
static void *(*msg_data)(msg_t *);
static size_t (*msg_size)(const msg_t *);
static int (*last_errno)(void);
static const char *(*error_text)(int);
static void (*get_version)(int *, int *, int *);

static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("floor: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

/* End with libzmq's own words if a call of it failed. */
static int check(int result, const char *what)
{
    if (result < 0)
        die("%s: %s", what, error_text(last_errno()));
    return result;
}

static void resolve(void *library, const char *name, void *slot)
{
    void *symbol = dlsym(library, name);
    if (symbol == NULL)
        die("%s", dlerror());
    memcpy(slot, &symbol, sizeof symbol);       /* ISO C has no cast from an object to a function pointer */
}

static void load(const char *path)
{
    void *library = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
    if (library == NULL)
        die("%s", dlerror());
    resolve(library, "zmq_ctx_new", &ctx_new);
    resolve(library, "zmq_socket", &new_socket);
    resolve(library, "zmq_setsockopt", &set_option);
    resolve(library, "zmq_getsockopt", &get_option);
    resolve(library, "zmq_bind", &zbind);
    resolve(library, "zmq_connect", &zconnect);
    resolve(library, "zmq_close", &zclose);
    resolve(library, "zmq_msg_init", &msg_init);
    resolve(library, "zmq_msg_init_size", &msg_init_size);
    resolve(library, "zmq_msg_init_data", &msg_init_data);
    resolve(library, "zmq_msg_send", &msg_send);
    resolve(library, "zmq_msg_recv", &msg_recv);
    resolve(library, "zmq_msg_close", &msg_close);
    resolve(library, "zmq_msg_data", &msg_data);
    resolve(library, "zmq_msg_size", &msg_size);
    resolve(library, "zmq_errno", &last_errno);
    resolve(library, "zmq_strerror", &error_text);
    resolve(library, "zmq_version", &get_version);
}

/* -- clocks -------------------------------------------------------------------------------------------------------- */

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* -- messages ------------------------------------------------------------------------------------------------------ */

enum { CALL = 'C', CAST = 'O', FINISH = 'F' };
enum { SMALLEST = 16 };
/* A payload of at least this many bytes is sent from where it is. Below, copying it is cheaper (see README.md). */
enum { ZERO_COPY_BYTES = 262144 };

static void keep(void *data, void *hint) { (void)data, (void)hint; }

/* Send `size` bytes of `buffer` as kind `kind`, number `number`. `buffer` stays the caller's; a large one must not
   change before the answer to it has come. */
static void send_payload(void *socket, unsigned char *buffer, size_t size, unsigned char kind, uint64_t number)
{
    msg_t message;
    buffer[0] = kind;
    memcpy(buffer + 8, &number, sizeof number);
    if (size >= ZERO_COPY_BYTES) {
        check(msg_init_data(&message, buffer, size, keep, NULL), "zmq_msg_init_data");
    } else {
        check(msg_init_size(&message, size), "zmq_msg_init_size");
        memcpy(msg_data(&message), buffer, size);
    }
    check(msg_send(&message, socket, 0), "zmq_msg_send");
}

static void receive_answer(void *socket, size_t size, uint64_t number)
{
    msg_t message;
    uint64_t got;
    msg_init(&message);
    check(msg_recv(&message, socket, 0), "zmq_msg_recv");
    if (msg_size(&message) != size)
        die("an answer of %zu bytes, not of %zu", msg_size(&message), size);
    memcpy(&got, (unsigned char *)msg_data(&message) + 8, sizeof got);
    if (got != number)
        die("answer %llu, not %llu", (unsigned long long)got, (unsigned long long)number);
    msg_close(&message);
}

static unsigned char *new_payload(size_t size)
{
    unsigned char *buffer = malloc(size);
    if (buffer == NULL)
        die("no memory for a payload of %zu bytes", size);
    memset(buffer, 'x', size);
    return buffer;
}

/* -- server -------------------------------------------------------------------------------------------------------- */

static void *server_control(void *unused)
{
    char line[64];
    (void)unused;
    while (fgets(line, sizeof line, stdin) != NULL) {
        printf("{\"cpu\": %.6f}\n", cpu_seconds());
        fflush(stdout);
    }
    _exit(0);           /* the parent is gone, or wants us gone */
}

static void serve(void *context, const char *endpoint)
{
    void *router = new_socket(context, ZMQ_ROUTER);
    char bound[512];
    size_t length = sizeof bound;
    pthread_t control;
    uint64_t counted = 0;
    msg_t identity, body;

    if (router == NULL)
        die("zmq_socket: %s", error_text(last_errno()));
    check(zbind(router, endpoint), endpoint);
    check(get_option(router, ZMQ_LAST_ENDPOINT, bound, &length), "ZMQ_LAST_ENDPOINT");
    printf("{\"endpoint\": \"%s\"}\n", bound);
    fflush(stdout);
    if (pthread_create(&control, NULL, server_control, NULL) != 0)
        die("pthread_create failed");

    for (;;) {
        unsigned char kind;
        msg_init(&identity);
        msg_init(&body);
        check(msg_recv(&identity, router, 0), "zmq_msg_recv");
        check(msg_recv(&body, router, 0), "zmq_msg_recv");
        kind = *(unsigned char *)msg_data(&body);
        if (kind == CAST) {
            counted++;
            msg_close(&identity);
            msg_close(&body);
            continue;
        }
        if (kind == FINISH) {
            uint64_t answer[2] = { counted, now_ns() };
            msg_close(&body);
            check(msg_init_size(&body, sizeof answer), "zmq_msg_init_size");
            memcpy(msg_data(&body), answer, sizeof answer);
            counted = 0;
        }
        check(msg_send(&identity, router, ZMQ_SNDMORE), "zmq_msg_send");
        check(msg_send(&body, router, 0), "zmq_msg_send");
    }
}

/* -- client -------------------------------------------------------------------------------------------------------- */

static void *connected(void *context, const char *endpoint)
{
    void *dealer = new_socket(context, ZMQ_DEALER);
    int zero = 0;
    if (dealer == NULL)
        die("zmq_socket: %s", error_text(last_errno()));
    set_option(dealer, ZMQ_LINGER, &zero, sizeof zero);
    check(zconnect(dealer, endpoint), endpoint);
    return dealer;
}

enum { MOST_SAMPLES = 1 << 22 };        /* round trips of 1 µs for 4 s; more are counted but not sampled */

typedef struct {
    void *context;
    const char *endpoint;
    size_t size;
    double seconds;
    uint64_t calls, calls_with_warmup, elapsed_ns, worst_ns;
    uint32_t *samples;          /* owned; ns each */
    size_t sampled;
} run_t;

typedef void call_t(void *address, unsigned char *payload, size_t size, uint64_t number);

static void call_on(void *dealer, unsigned char *payload, size_t size, uint64_t number)
{
    send_payload(dealer, payload, size, CALL, number);
    receive_answer(dealer, size, number);
}

static int ascending(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* One call to `address` after the other; a fifth of the time (at most 0.1 s) goes before to warm up. */
static void sequential(run_t *run, call_t *call, void *address)
{
    unsigned char *payload = new_payload(run->size);
    uint64_t warm_ns = (uint64_t)((run->seconds / 5 < 0.1 ? run->seconds / 5 : 0.1) * 1e9);
    uint64_t begin = now_ns(), last = begin, number = 0, t;

    while (last - begin < warm_ns) {
        call(address, payload, run->size, number++);
        last = now_ns();
    }
    begin = last = now_ns();
    while (last - begin < (uint64_t)(run->seconds * 1e9)) {
        call(address, payload, run->size, number++);
        t = now_ns();
        if (run->sampled < MOST_SAMPLES)
            run->samples[run->sampled++] = (uint32_t)(t - last);
        if (t - last > run->worst_ns)
            run->worst_ns = t - last;
        run->calls++;
        last = t;
    }
    run->elapsed_ns = last - begin;
    run->calls_with_warmup = number;
    free(payload);
}

static void start_run(run_t *run, void *context, const char *endpoint, size_t size, double seconds)
{
    memset(run, 0, sizeof *run);
    run->context = context;
    run->endpoint = endpoint;
    run->size = size;
    run->seconds = seconds;
    run->samples = malloc(MOST_SAMPLES * sizeof *run->samples);
    if (run->samples == NULL)
        die("no memory for the samples");
}

static void report(const run_t *run, double cpu)
{
    double p50 = 0, p99 = 0;
    if (run->sampled > 0) {
        qsort(run->samples, run->sampled, sizeof *run->samples, ascending);
        p50 = run->samples[run->sampled / 2] * 1e-3;
        p99 = run->samples[(size_t)((double)run->sampled * 0.99)] * 1e-3;
    }
    printf("{\"calls\": %llu, \"rate\": %.1f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f, "
           "\"total\": %llu, \"cpu\": %.6f}\n",
           (unsigned long long)run->calls, (double)run->calls * 1e9 / (double)run->elapsed_ns, p50, p99,
           (double)run->worst_ns * 1e-3, (unsigned long long)run->calls_with_warmup, cpu_seconds() - cpu);
}

static void task_call(call_t *call, void *address, size_t size, double seconds)
{
    double cpu = cpu_seconds();
    run_t run;
    start_run(&run, NULL, NULL, size, seconds);
    sequential(&run, call, address);
    report(&run, cpu);
    free(run.samples);
}

static void *one_thread(void *argument)
{
    run_t *run = argument;
    void *dealer = connected(run->context, run->endpoint);
    sequential(run, call_on, dealer);
    zclose(dealer);
    return NULL;
}

enum { MOST_THREADS = 64 };

static void task_threads(void *context, const char *endpoint, size_t size, double seconds, int threads)
{
    static run_t runs[MOST_THREADS];
    pthread_t ids[MOST_THREADS];
    double cpu = cpu_seconds(), rate = 0;
    uint64_t calls = 0, total = 0, worst = 0;
    int i;

    if (threads < 1 || threads > MOST_THREADS)
        die("%d threads; 1 to %d are possible", threads, MOST_THREADS);
    for (i = 0; i < threads; i++) {
        start_run(&runs[i], context, endpoint, size, seconds);
        if (pthread_create(&ids[i], NULL, one_thread, &runs[i]) != 0)
            die("pthread_create failed");
    }
    for (i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        calls += runs[i].calls;
        total += runs[i].calls_with_warmup;
        rate += (double)runs[i].calls * 1e9 / (double)runs[i].elapsed_ns;
        worst = runs[i].worst_ns > worst ? runs[i].worst_ns : worst;
        free(runs[i].samples);
    }
    printf("{\"calls\": %llu, \"rate\": %.1f, \"max_us\": %.2f, \"total\": %llu, \"cpu\": %.6f}\n",
           (unsigned long long)calls, rate, (double)worst * 1e-3, (unsigned long long)total, cpu_seconds() - cpu);
}

static void task_inflight(void *dealer, size_t size, double seconds, uint64_t depth)
{
    double cpu = cpu_seconds();
    unsigned char *payload = new_payload(size);
    uint64_t sent = 0, answered = 0, begin, end;

    if (size >= ZERO_COPY_BYTES)
        die("inflight: a payload of %zu bytes would be changed while it is sent", size);
    begin = now_ns();
    end = begin + (uint64_t)(seconds * 1e9);
    while (sent < depth)
        send_payload(dealer, payload, size, CALL, sent++);
    do {
        receive_answer(dealer, size, answered++);
        send_payload(dealer, payload, size, CALL, sent++);
    } while ((answered & 63) || now_ns() < end);
    while (answered < sent)
        receive_answer(dealer, size, answered++);
    printf("{\"calls\": %llu, \"rate\": %.1f, \"total\": %llu, \"cpu\": %.6f}\n", (unsigned long long)answered,
           (double)answered * 1e9 / (double)(now_ns() - begin), (unsigned long long)answered, cpu_seconds() - cpu);
    free(payload);
}

/* How many messages the server of `dealer` has counted since the last time; *last becomes its clock if that is later. */
static uint64_t counted(void *dealer, uint64_t *last)
{
    unsigned char payload[SMALLEST] = { 0 };
    uint64_t answer[2];
    msg_t message;

    send_payload(dealer, payload, sizeof payload, FINISH, 0);
    msg_init(&message);
    check(msg_recv(&message, dealer, 0), "zmq_msg_recv");
    memcpy(answer, msg_data(&message), sizeof answer);
    msg_close(&message);
    *last = answer[1] > *last ? answer[1] : *last;
    return answer[0];
}

static void task_cast(void **dealers, int count, size_t size, double seconds)
{
    double cpu = cpu_seconds();
    unsigned char *payload = new_payload(size);
    uint64_t sent = 0, handled = 0, begin, end, last = 0;
    int i;

    if (size >= ZERO_COPY_BYTES)
        die("one way: a payload of %zu bytes would be changed while it is sent", size);
    for (i = 0; i < count; i++)
        counted(dealers[i], &last);     /* connected */
    begin = now_ns();
    end = begin + (uint64_t)(seconds * 1e9);
    do {
        for (i = 0; i < count; i++)
            send_payload(dealers[i], payload, size, CAST, sent);
    } while ((++sent & 255) || now_ns() < end);
    sent *= (uint64_t)count;
    for (i = 0; i < count; i++)
        handled += counted(dealers[i], &last);
    if (handled != sent)
        die("%llu messages sent, %llu counted", (unsigned long long)sent, (unsigned long long)handled);
    printf("{\"calls\": %llu, \"rate\": %.1f, \"total\": %llu, \"cpu\": %.6f}\n", (unsigned long long)sent,
           (double)sent * 1e9 / (double)(last - begin), (unsigned long long)sent, cpu_seconds() - cpu);
    free(payload);
}

/* -- many endpoints ------------------------------------------------------------------------------------------------ */

enum { MOST_DEALERS = 1000 };

typedef struct {
    void *context;
    const char *port;           /* of a server that listens on all of 127.0.0.0/8 */
    unsigned long count, next;
    void *kept[MOST_DEALERS];
} many_t;

static void *connected_to(many_t *many, unsigned long number)
{
    char endpoint[64];
    snprintf(endpoint, sizeof endpoint, "tcp://127.1.%lu.%lu:%s", number / 250, 1 + number % 250, many->port);
    return connected(many->context, endpoint);
}

static void call_kept(void *address, unsigned char *payload, size_t size, uint64_t number)
{
    many_t *many = address;
    call_on(many->kept[many->next++ % many->count], payload, size, number);
}

static void call_new(void *address, unsigned char *payload, size_t size, uint64_t number)
{
    many_t *many = address;
    void *dealer = connected_to(many, many->next++ % many->count);
    call_on(dealer, payload, size, number);
    zclose(dealer);
}

static void open_kept(many_t *many, size_t size, unsigned long count)
{
    unsigned char *payload = new_payload(size);
    uint64_t begin = now_ns();
    for (many->count = 0; many->count < count; many->count++) {
        many->kept[many->count] = connected_to(many, many->count);
        call_on(many->kept[many->count], payload, size, many->count);
    }
    printf("{\"open\": %lu, \"seconds\": %.6f}\n", count, (double)(now_ns() - begin) * 1e-9);
    free(payload);
}

static void shut_kept(many_t *many)
{
    while (many->count > 0)
        zclose(many->kept[--many->count]);
    printf("{}\n");
}

static void fanout(void *context, char **endpoints, int count, size_t size, double seconds)
{
    void *dealers[MOST_DEALERS];
    int i;
    for (i = 0; i < count; i++)
        dealers[i] = connected(context, endpoints[i]);
    task_cast(dealers, count, size, seconds);
    for (i = 0; i < count; i++)
        zclose(dealers[i]);
}

/* Run a task that needs more than one endpoint; return 0 if `task` is none. */
static int task_many(many_t *many, const char *task, size_t size, double seconds, unsigned long count)
{
    if (count > MOST_DEALERS)
        die("%lu endpoints; at most %d are possible", count, MOST_DEALERS);
    if (strcmp(task, "open") == 0) {
        open_kept(many, size, count);
    } else if (strcmp(task, "kept") == 0 && many->count > 0) {
        task_call(call_kept, many, size, seconds);
    } else if (strcmp(task, "shut") == 0) {
        shut_kept(many);
    } else if (strcmp(task, "new") == 0 && count > 0) {
        many->count = count;
        task_call(call_new, many, size, seconds);
        many->count = 0;
    } else {
        return 0;
    }
    return 1;
}

static void client(void *context, char **endpoints, int count)
{
    void *dealer = connected(context, endpoints[0]);
    static many_t many;
    char line[256], task[32];
    int major, minor, patch;

    many.context = context;
    many.port = strrchr(endpoints[0], ':') + 1;
    get_version(&major, &minor, &patch);
    printf("{\"libzmq\": \"%d.%d.%d\"}\n", major, minor, patch);
    fflush(stdout);
    while (fgets(line, sizeof line, stdin) != NULL) {
        unsigned long size = 0, extra = 0;
        double seconds = 0;
        int fields = sscanf(line, "%31s %lu %lf %lu", task, &size, &seconds, &extra);
        if (fields < 1)
            continue;
        if (strcmp(task, "cpu") == 0)
            printf("{\"cpu\": %.6f}\n", cpu_seconds());
        else if (fields < 3 || (size < SMALLEST && strcmp(task, "shut") != 0))
            die("bad command (a payload has at least %d bytes): %s", SMALLEST, line);
        else if (strcmp(task, "call") == 0)
            task_call(call_on, dealer, size, seconds);
        else if (strcmp(task, "cast") == 0)
            task_cast(&dealer, 1, size, seconds);
        else if (strcmp(task, "fanout") == 0)
            fanout(context, endpoints, count, size, seconds);
        else if (strcmp(task, "inflight") == 0 && fields == 4)
            task_inflight(dealer, size, seconds, extra);
        else if (strcmp(task, "threads") == 0 && fields == 4)
            task_threads(context, endpoints[0], size, seconds, (int)extra);
        else if (!task_many(&many, task, size, seconds, extra))
            die("unknown command: %s", line);
        fflush(stdout);
    }
    _exit(0);           /* nothing left to flush or hand over; skips libzmq's orderly shutdown */
}

int main(int argc, char **argv)
{
    void *context;
    if (argc < 4 || argc - 3 > MOST_DEALERS)
        die("usage: floor LIBZMQ server ENDPOINT|client ENDPOINT...");
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    load(argv[1]);
    context = ctx_new();
    if (context == NULL)
        die("zmq_ctx_new: %s", error_text(last_errno()));
    if (strcmp(argv[2], "server") == 0)
        serve(context, argv[3]);
    else if (strcmp(argv[2], "client") == 0)
        client(context, argv + 3, argc - 3);
    else
        die("usage: floor LIBZMQ server ENDPOINT|client ENDPOINT...");
    return 0;
}
