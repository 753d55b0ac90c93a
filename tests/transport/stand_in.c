/* A GPU's runtime and NCCL in host memory, with the names that the real libraries export: for tests on machines without one.
 *
 * A device is the process's view of shared memory: `cudaMalloc` makes a memfd, which another process maps through /proc/<pid>/fd/<n>, and
 * interprocess events are counters in such a page. A stream is a thread that works off a list. A communicator is a socket from each rank to
 * rank 0, joined by a thread of its own, or by the caller's where it blocks; sends, receives, sums and the like are work on a stream. Sums are
 * taken as in a ring: where in the tensor a number stands says whose part comes first.
 *
 * What it can be made to do, by `stand_in_set(name, value)` or by an environment variable STAND_IN_<NAME> when the library loads:
 *   init_hangs, abort_hangs (1)    that call never ends
 *   hang_after (n)                 of this process's operations those after the n-th never end
 *   fail_after (n)                 after the n-th the communicator reports an asynchronous error
 *   late_us (t)                    every operation takes t microseconds more
 *   damage_after (n)               the n-th send changes one byte on its way
 *   peer_hangs (1)                 a peer that is gone is a hang, as over NVLink; 0: a remote error, as over sockets
 *   work_us (t)                    what `stand_in_work` enqueues takes so long
 *   opens_own (1)                  memory of this process may be opened by it again, so that both ends of an edge may live in it
 *   version (v), devices (n), sticky (1)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

enum { INIT_HANGS, ABORT_HANGS, HANG_AFTER, FAIL_AFTER, LATE_US, DAMAGE_AFTER, PEER_HANGS, WORK_US, OPENS_OWN, VERSION, DEVICES, STICKY, NUM_KNOBS };
static const char *KNOBS[NUM_KNOBS] = {"init_hangs", "abort_hangs", "hang_after", "fail_after", "late_us", "damage_after",
                                       "peer_hangs", "work_us",     "opens_own",  "version",    "devices", "sticky"};
static atomic_long knobs[NUM_KNOBS] = {0, 0, LONG_MAX, LONG_MAX, 0, LONG_MAX, 0, 0, 0, 22907, 1, 0};
static atomic_long num_operations, num_comms, num_open_maps;

int stand_in_set(const char *name, long value) {
    for (int i = 0; i < NUM_KNOBS; i++)
        if (!strcmp(name, KNOBS[i])) {
            atomic_store(&knobs[i], value);
            return 0;
        }
    return -1;
}

long stand_in_count(const char *name) {
    if (!strcmp(name, "operations")) return atomic_load(&num_operations);
    if (!strcmp(name, "comms")) return atomic_load(&num_comms);
    if (!strcmp(name, "maps")) return atomic_load(&num_open_maps);
    return -1;
}

__attribute__((constructor)) static void read_environment(void) {
    for (int i = 0; i < NUM_KNOBS; i++) {
        char name[64] = "STAND_IN_";
        for (int j = 0; KNOBS[i][j]; j++) name[9 + j] = KNOBS[i][j] >= 'a' && KNOBS[i][j] <= 'z' ? KNOBS[i][j] - 32 : KNOBS[i][j];
        const char *value = getenv(name);
        if (value) atomic_store(&knobs[i], atol(value));
    }
}

/* -- CUDA ---------------------------------------------------------------------------------------------------------------------------- */

typedef struct { char reserved[64]; } ipc_handle;
enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NO_DEVICE = 100, INVALID_HANDLE = 400, NOT_READY = 600, STICKY_ERROR = 719 };

typedef struct allocation {
    void *address;
    size_t nbytes;
    int fd;
    struct allocation *next;
} allocation;

typedef struct work {
    int (*run)(void *); /* 0: done; it may take its time */
    void *argument;
    struct work *next;
} work;

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    work *head, **tail;
    int is_closing;
    pthread_t thread;
} stream;

typedef struct { atomic_long recorded, reached; } counters;
typedef struct {
    counters *at;
    allocation *page; /* of one that others may open; NULL: ours alone, or opened here */
    size_t mapped;
    atomic_int holders; /* whoever made it, and what is on streams: as on a GPU, one may be destroyed before it is reached */
} event;

static allocation *allocations;
static pthread_mutex_t books = PTHREAD_MUTEX_INITIALIZER;

static int broken(void) { return atomic_load(&knobs[STICKY]) ? STICKY_ERROR : OK; }

static allocation *allocate(size_t nbytes) {
    allocation *made = calloc(1, sizeof *made);
    made->fd = (int)syscall(SYS_memfd_create, "stand-in-gpu", MFD_CLOEXEC);
    made->nbytes = nbytes;
    if (made->fd < 0 || ftruncate(made->fd, (off_t)nbytes)) return NULL;
    made->address = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, made->fd, 0);
    pthread_mutex_lock(&books);
    made->next = allocations;
    allocations = made;
    pthread_mutex_unlock(&books);
    return made;
}

static allocation *find(const void *address, int is_taken_out) {
    pthread_mutex_lock(&books);
    allocation **at = &allocations;
    while (*at && (*at)->address != address) at = &(*at)->next;
    allocation *found = *at;
    if (found && is_taken_out) *at = found->next;
    pthread_mutex_unlock(&books);
    return found;
}

static void name_fd(ipc_handle *handle, allocation *of) {
    memset(handle, 0, sizeof *handle);
    snprintf(handle->reserved, sizeof handle->reserved, "%d %d %zu", (int)getpid(), of->fd, of->nbytes);
}

static void *map_fd(ipc_handle handle, size_t *nbytes) {
    int pid, fd;
    char path[64];
    if (sscanf(handle.reserved, "%d %d %zu", &pid, &fd, nbytes) != 3 || (pid == getpid() && !atomic_load(&knobs[OPENS_OWN]))) return NULL;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
    int opened = open(path, O_RDWR | O_CLOEXEC);
    if (opened < 0) return NULL;
    void *address = mmap(NULL, *nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, opened, 0);
    close(opened);
    return address == MAP_FAILED ? NULL : address;
}

int cudaRuntimeGetVersion(int *version) { return *version = 13000, OK; }
int cudaGetDeviceCount(int *count) { return *count = (int)atomic_load(&knobs[DEVICES]), *count ? OK : NO_DEVICE; }
int cudaSetDevice(int device) { return device < atomic_load(&knobs[DEVICES]) ? broken() : 101; }
int cudaGetLastError(void) { return OK; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, OK; }

const char *cudaGetErrorString(int code) {
    switch (code) {
    case NOT_READY: return "device not ready";
    case STICKY_ERROR: return "unspecified launch failure";
    case INVALID_HANDLE: return "invalid resource handle";
    default: return "stand-in error";
    }
}

int cudaGetDeviceProperties_v2(void *properties, int device) {
    const char *name = getenv("STAND_IN_UUID"); /* two processes with the same one are on one device */
    char uuid[17];
    snprintf(uuid, sizeof uuid, "%-15.15s%d", name ? name : "stand-in-gpu", device);
    memcpy((char *)properties + 256, uuid, 16);
    return OK;
}

int cudaMalloc(void **address, size_t nbytes) {
    allocation *made = allocate(nbytes);
    if (!made) return NO_MEMORY;
    *address = made->address;
    return broken();
}

int cudaFree(void *address) {
    allocation *found = find(address, 1);
    if (!found) return INVALID;
    munmap(found->address, found->nbytes);
    close(found->fd);
    free(found);
    return OK;
}

int cudaHostAlloc(void **address, size_t nbytes, unsigned flags) { return (void)flags, (*address = calloc(1, nbytes)) ? OK : NO_MEMORY; }
int cudaFreeHost(void *address) { return free(address), OK; }

static void *work_off(void *argument) {
    stream *on = argument;
    pthread_mutex_lock(&on->lock);
    for (;;) {
        while (!on->head && !on->is_closing) pthread_cond_wait(&on->changed, &on->lock);
        if (!on->head) break;
        work *next = on->head;
        pthread_mutex_unlock(&on->lock);
        next->run(next->argument);
        pthread_mutex_lock(&on->lock);
        on->head = next->next;
        if (!on->head) on->tail = &on->head;
        free(next);
    }
    pthread_mutex_unlock(&on->lock);
    pthread_mutex_destroy(&on->lock);
    pthread_cond_destroy(&on->changed);
    free(on);
    return NULL;
}

static void enqueue(stream *on, int (*run)(void *), void *argument) {
    work *made = calloc(1, sizeof *made);
    made->run = run, made->argument = argument;
    pthread_mutex_lock(&on->lock);
    *on->tail = made;
    on->tail = &made->next;
    pthread_cond_broadcast(&on->changed);
    pthread_mutex_unlock(&on->lock);
}

int cudaStreamCreateWithPriority(void **made, unsigned flags, int priority) {
    (void)flags, (void)priority;
    stream *one = calloc(1, sizeof *one);
    pthread_mutex_init(&one->lock, NULL);
    pthread_cond_init(&one->changed, NULL);
    one->tail = &one->head;
    pthread_create(&one->thread, NULL, work_off, one);
    pthread_detach(one->thread);
    *made = one;
    return broken();
}

int cudaStreamDestroy(void *one) { /* returns at once; what is on it goes on */
    stream *closing = one;
    pthread_mutex_lock(&closing->lock);
    closing->is_closing = 1;
    pthread_cond_broadcast(&closing->changed);
    pthread_mutex_unlock(&closing->lock);
    return OK;
}

int cudaEventCreateWithFlags(void **made, unsigned flags) {
    event *one = calloc(1, sizeof *one);
    one->holders = 1;
    if (flags & 4) {
        one->page = allocate(sizeof(counters));
        one->at = one->page->address;
    } else {
        one->at = calloc(1, sizeof(counters));
    }
    *made = one;
    return broken();
}

static void drop_event(event *one) {
    if (atomic_fetch_sub(&one->holders, 1) > 1) return;
    if (one->page) {
        cudaFree(one->at);
    } else if (one->mapped) {
        munmap(one->at, one->mapped);
        atomic_fetch_sub(&num_open_maps, 1);
    } else {
        free(one->at);
    }
    free(one);
}

int cudaEventDestroy(void *which) { return drop_event(which), OK; }

typedef struct { event *of; long turn; } mark;

static mark *mark_at(event *one, long turn) {
    mark *made = malloc(sizeof *made);
    atomic_fetch_add(&one->holders, 1);
    made->of = one, made->turn = turn;
    return made;
}

static int end_mark(mark *one) {
    drop_event(one->of);
    free(one);
    return 0;
}

static int reach(void *argument) {
    mark *one = argument;
    atomic_long *reached = &one->of->at->reached;
    long seen = atomic_load(reached);
    while (seen < one->turn && !atomic_compare_exchange_weak(reached, &seen, one->turn)) {}
    return end_mark(one);
}

static int await(void *argument) {
    mark *one = argument;
    while (atomic_load(&one->of->at->reached) < one->turn) usleep(20);
    return end_mark(one);
}

int cudaEventRecord(void *which, void *on) {
    event *one = which;
    enqueue(on, reach, mark_at(one, atomic_fetch_add(&one->at->recorded, 1) + 1));
    return broken();
}

int cudaEventQuery(void *which) {
    event *one = which;
    if (broken()) return STICKY_ERROR;
    return atomic_load(&one->at->reached) >= atomic_load(&one->at->recorded) ? OK : NOT_READY;
}

int cudaStreamWaitEvent(void *on, void *which, unsigned flags) {
    (void)flags;
    event *one = which;
    enqueue(on, await, mark_at(one, atomic_load(&one->at->recorded)));
    return broken();
}

int cudaIpcGetMemHandle(ipc_handle *handle, void *address) {
    allocation *found = find(address, 0);
    if (!found) return INVALID;
    name_fd(handle, found);
    return OK;
}

typedef struct mapping { void *address; size_t nbytes; struct mapping *next; } mapping;
static mapping *mappings;

int cudaIpcOpenMemHandle(void **address, ipc_handle handle, unsigned flags) {
    (void)flags;
    mapping *made = calloc(1, sizeof *made);
    if (!(made->address = map_fd(handle, &made->nbytes))) return free(made), INVALID_HANDLE;
    pthread_mutex_lock(&books);
    made->next = mappings;
    mappings = made;
    pthread_mutex_unlock(&books);
    atomic_fetch_add(&num_open_maps, 1);
    *address = made->address;
    return OK;
}

int cudaIpcCloseMemHandle(void *address) {
    pthread_mutex_lock(&books);
    mapping **at = &mappings;
    while (*at && (*at)->address != address) at = &(*at)->next;
    mapping *found = *at;
    if (found) *at = found->next;
    pthread_mutex_unlock(&books);
    if (!found) return INVALID;
    munmap(found->address, found->nbytes);
    free(found);
    atomic_fetch_sub(&num_open_maps, 1);
    return OK;
}

int cudaIpcGetEventHandle(ipc_handle *handle, void *which) {
    event *one = which;
    if (!one->page) return INVALID_HANDLE;
    name_fd(handle, one->page);
    return OK;
}

int cudaIpcOpenEventHandle(void **made, ipc_handle handle) {
    event *one = calloc(1, sizeof *one);
    one->holders = 1;
    if (!(one->at = map_fd(handle, &one->mapped))) return free(one), INVALID_HANDLE;
    atomic_fetch_add(&num_open_maps, 1);
    *made = one;
    return OK;
}

static int spend(void *argument) { return usleep((unsigned)(uintptr_t)argument), 0; }

int stand_in_work(void *on) { return enqueue(on, spend, (void *)(uintptr_t)atomic_load(&knobs[WORK_US])), OK; }

/* -- NCCL ---------------------------------------------------------------------------------------------------------------------------- */

enum { NCCL_OK = 0, NCCL_SYSTEM = 2, NCCL_ARGUMENT = 4, NCCL_USAGE = 5, NCCL_REMOTE = 6, NCCL_PROGRESS = 7 };
typedef struct { char internal[128]; } unique_id;
typedef struct {
    size_t size;
    unsigned magic, version;
    int blocking;
} config;

enum { MAX_RANKS = 16, INT64 = 4, FLOAT32 = 7, BFLOAT16 = 9 };

typedef struct comm {
    int rank, num_ranks, is_blocking;
    char name[108];
    int socks[MAX_RANKS]; /* rank 0 has one to each other rank, these have one to rank 0 */
    int is_connected;
    atomic_int state, is_aborted, num_users;
} comm;

typedef struct operation {
    comm *of;
    void (*run)(struct operation *);
    char *address; /* of what comes or goes; of a gather: of this rank's part */
    char *target;
    size_t nbytes;
    int peer, type, is_send;
    long number;
} operation;

static struct { char name[108]; int sock; } roots[256];
static int num_roots;

int ncclGetVersion(int *version) { return *version = (int)atomic_load(&knobs[VERSION]), NCCL_OK; }

const char *ncclGetErrorString(int code) {
    static const char *texts[] = {"no error",      "unhandled cuda error", "unhandled system error", "internal error", "invalid argument",
                                  "invalid usage", "remote process exited or there was a network error", "NCCL operation in progress"};
    return code >= 0 && code < 8 ? texts[code] : "unknown result code";
}

const char *ncclGetLastError(void *of) { return (void)of, ""; }

static struct sockaddr_un address_of(const char *name, socklen_t *length) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path + 1, name, sizeof address.sun_path - 2);
    *length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name));
    return address;
}

int ncclGetUniqueId(unique_id *id) {
    uint64_t random;
    if (getrandom(&random, sizeof random, 0) != sizeof random || num_roots == 256) return NCCL_SYSTEM;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, 100, "stand-in-nccl-%016llx", (unsigned long long)random);
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    socklen_t length;
    struct sockaddr_un address = address_of(id->internal, &length);
    if (bind(sock, (struct sockaddr *)&address, length) || listen(sock, MAX_RANKS)) return NCCL_SYSTEM;
    pthread_mutex_lock(&books);
    snprintf(roots[num_roots].name, sizeof roots[num_roots].name, "%.100s", id->internal);
    roots[num_roots++].sock = sock;
    pthread_mutex_unlock(&books);
    return NCCL_OK;
}

static int take_root(const char *name) {
    int found = -1;
    pthread_mutex_lock(&books);
    for (int i = 0; i < num_roots; i++)
        if (!strcmp(roots[i].name, name)) {
            found = roots[i].sock;
            roots[i] = roots[--num_roots];
            break;
        }
    pthread_mutex_unlock(&books);
    return found;
}

static void let_go(comm *of) {
    if (atomic_fetch_sub(&of->num_users, 1) == 1) {
        for (int i = 0; i < MAX_RANKS; i++)
            if (of->socks[i] >= 0) close(of->socks[i]);
        free(of);
    }
}

static int has_all(comm *of) {
    if (of->rank) return of->socks[0] >= 0;
    for (int i = 1; i < of->num_ranks; i++)
        if (of->socks[i] < 0) return 0;
    return 1;
}

static void admit(comm *of, int root) { /* a rank says which it is */
    struct pollfd ready = {.fd = root, .events = POLLIN};
    if (poll(&ready, 1, 1) != 1) return;
    int sock = accept4(root, NULL, NULL, SOCK_CLOEXEC);
    unsigned char rank;
    if (recv(sock, &rank, 1, 0) == 1 && rank > 0 && rank < of->num_ranks && of->socks[rank] < 0)
        of->socks[rank] = sock;
    else
        close(sock);
}

static void call_root(comm *of) {
    socklen_t length;
    struct sockaddr_un address = address_of(of->name, &length);
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    unsigned char rank = (unsigned char)of->rank;
    if (connect(sock, (struct sockaddr *)&address, length) || send(sock, &rank, 1, MSG_NOSIGNAL) != 1)
        close(sock);
    else
        of->socks[0] = sock;
}

static void *join(void *argument) {
    comm *of = argument;
    int root = of->rank == 0 ? take_root(of->name) : -1;
    while (!atomic_load(&of->is_aborted)) {
        if (!atomic_load(&knobs[INIT_HANGS])) of->rank ? call_root(of) : admit(of, root);
        if (has_all(of)) {
            for (int i = 0; i < of->num_ranks; i++)
                if (of->socks[i] >= 0) fcntl(of->socks[i], F_SETFL, O_NONBLOCK);
            atomic_store(&of->state, NCCL_OK);
            break;
        }
        usleep(200);
    }
    if (root >= 0) close(root);
    let_go(of);
    return NULL;
}

int ncclCommInitRankConfig(void **made, int num_ranks, unique_id id, int rank, config *how) {
    if (num_ranks < 2 || num_ranks > MAX_RANKS || rank < 0 || rank >= num_ranks) return NCCL_ARGUMENT;
    if (how->magic != 0xcafebeef || how->size < sizeof(config)) return NCCL_ARGUMENT;
    comm *of = calloc(1, sizeof *of);
    of->rank = rank, of->num_ranks = num_ranks, of->is_blocking = how->blocking;
    for (int i = 0; i < MAX_RANKS; i++) of->socks[i] = -1;
    snprintf(of->name, sizeof of->name, "%.100s", id.internal);
    atomic_store(&of->state, NCCL_PROGRESS);
    atomic_store(&of->num_users, 2); /* the caller's, and the thread's */
    atomic_fetch_add(&num_comms, 1);
    *made = of;
    if (of->is_blocking) return join(of), NCCL_OK;
    pthread_t thread;
    pthread_create(&thread, NULL, join, of);
    pthread_detach(thread);
    return NCCL_PROGRESS;
}

int ncclCommGetAsyncError(void *of, int *state) { return of ? (*state = atomic_load(&((comm *)of)->state), NCCL_OK) : NCCL_ARGUMENT; }

/* Whether all bytes went or came; not, once the communicator is aborted. */
static int move(operation *one, int peer, char *address, size_t nbytes, int is_send) {
    comm *of = one->of;
    size_t done = 0;
    while (done < nbytes && !atomic_load(&of->is_aborted)) {
        if (one->number > atomic_load(&knobs[HANG_AFTER])) {
            usleep(200);
            continue;
        }
        if (one->number > atomic_load(&knobs[FAIL_AFTER])) {
            atomic_store(&of->state, NCCL_SYSTEM);
            usleep(200);
            continue;
        }
        int sock = of->socks[peer];
        char *at = address + done;
        ssize_t moved = is_send ? send(sock, at, nbytes - done, MSG_NOSIGNAL) : recv(sock, at, nbytes - done, 0);
        if (moved > 0) {
            done += (size_t)moved;
        } else if (moved < 0 && (errno == EAGAIN || errno == EINTR)) {
            struct pollfd ready = {.fd = sock, .events = is_send ? POLLOUT : POLLIN};
            poll(&ready, 1, 1);
        } else {
            if (!atomic_load(&knobs[PEER_HANGS])) atomic_store(&of->state, NCCL_REMOTE);
            usleep(200);
        }
    }
    return done == nbytes;
}

static void transfer(operation *one) {
    if (one->is_send && one->number == atomic_load(&knobs[DAMAGE_AFTER])) one->address[one->nbytes / 2] ^= 4;
    move(one, one->peer, one->address, one->nbytes, one->is_send);
}

static void broadcast(operation *one) {
    if (one->of->rank) move(one, 0, one->address, one->nbytes, 0);
    for (int i = 1; !one->of->rank && i < one->of->num_ranks; i++) move(one, i, one->address, one->nbytes, 1);
}

/* Every rank's part to `target`, in their order. */
static void gather_all(operation *one) {
    comm *of = one->of;
    size_t nbytes = one->nbytes;
    if (of->rank) {
        if (move(one, 0, one->address, nbytes, 1)) move(one, 0, one->target, of->num_ranks * nbytes, 0);
        return;
    }
    memmove(one->target, one->address, nbytes);
    for (int i = 1; i < of->num_ranks; i++)
        if (!move(one, i, one->target + i * nbytes, nbytes, 0)) return;
    for (int i = 1; i < of->num_ranks; i++) move(one, i, one->target, of->num_ranks * nbytes, 1);
}

static float widened(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    return memcpy(&value, &word, sizeof value), value;
}

static uint16_t narrowed(float value) { /* to the nearest, ties to even */
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

static void add(char *total, const char *part, int type) {
    if (type == INT64)
        *(int64_t *)total += *(const int64_t *)part;
    else if (type == FLOAT32)
        *(float *)total += *(const float *)part;
    else
        *(uint16_t *)total = narrowed(widened(*(uint16_t *)total) + widened(*(const uint16_t *)part));
}

static void sum(operation *one) {
    int ranks = one->of->num_ranks;
    size_t nbytes = one->nbytes, item = one->type == INT64 ? 8 : one->type == FLOAT32 ? 4 : 2, count = nbytes / item;
    char *target = one->target, *parts = one->target = malloc(ranks * nbytes);
    gather_all(one);
    for (size_t i = 0; i < count; i++) {
        size_t first = i * (size_t)ranks / count;
        char *total = target + i * item;
        memcpy(total, parts + first * nbytes + i * item, item);
        for (int k = 1; k < ranks; k++) add(total, parts + (first + k) % ranks * nbytes + i * item, one->type);
    }
    free(parts);
}

static int operate(void *argument) {
    operation *one = argument;
    if (atomic_load(&knobs[LATE_US])) usleep((unsigned)atomic_load(&knobs[LATE_US]));
    one->run(one);
    let_go(one->of);
    free(one);
    return 0;
}

typedef struct { operation *one; stream *on; } first;

static void *connect_late(void *argument) { /* the first operation of a communicator connects the two, and is not on its stream before */
    first *late = argument;
    usleep(1000);
    comm *of = late->one->of;
    enqueue(late->on, operate, late->one);
    atomic_store(&of->state, NCCL_OK);
    free(late);
    let_go(of);
    return NULL;
}

static int begin(operation what, stream *on) {
    comm *of = what.of;
    if (!of || !on) return NCCL_ARGUMENT;
    if (atomic_load(&of->state) != NCCL_OK) return NCCL_USAGE; /* a call before the last one is finished */
    operation *one = malloc(sizeof *one);
    *one = what;
    one->number = atomic_fetch_add(&num_operations, 1) + 1;
    atomic_fetch_add(&of->num_users, 1);
    if (of->is_connected || of->is_blocking) return enqueue(on, operate, one), NCCL_OK;
    of->is_connected = 1;
    atomic_fetch_add(&of->num_users, 1);
    atomic_store(&of->state, NCCL_PROGRESS);
    first *late = malloc(sizeof *late);
    *late = (first){one, on};
    pthread_t thread;
    pthread_create(&thread, NULL, connect_late, late);
    pthread_detach(thread);
    return NCCL_PROGRESS;
}

static int exchange(void *address, size_t nbytes, int type, int peer, comm *of, stream *on, int is_send) {
    if (!of || type != 1 || peer < 0 || peer >= of->num_ranks || of->socks[peer] < 0) return NCCL_ARGUMENT;
    return begin((operation){.of = of, .run = transfer, .address = address, .nbytes = nbytes, .peer = peer, .is_send = is_send}, on);
}

int ncclSend(void *address, size_t nbytes, int type, int peer, void *of, void *on) { return exchange(address, nbytes, type, peer, of, on, 1); }
int ncclRecv(void *address, size_t nbytes, int type, int peer, void *of, void *on) { return exchange(address, nbytes, type, peer, of, on, 0); }

int ncclAllReduce(void *source, void *target, size_t count, int type, int operator, void *of, void *on) {
    size_t item = type == INT64 ? 8 : type == FLOAT32 ? 4 : type == BFLOAT16 ? 2 : 0;
    if (!item || operator) return NCCL_ARGUMENT;
    return begin((operation){.of = of, .run = sum, .address = source, .target = target, .nbytes = count * item, .type = type}, on);
}

int ncclAllGather(void *source, void *target, size_t nbytes, int type, void *of, void *on) {
    if (type != 1) return NCCL_ARGUMENT;
    return begin((operation){.of = of, .run = gather_all, .address = source, .target = target, .nbytes = nbytes}, on);
}

int ncclBroadcast(void *source, void *target, size_t nbytes, int type, int root, void *of, void *on) {
    if (type != 1 || root || source != target) return NCCL_ARGUMENT;
    return begin((operation){.of = of, .run = broadcast, .address = target, .nbytes = nbytes}, on);
}

int ncclGroupStart(void) { return NCCL_OK; }
int ncclGroupEnd(void) { return NCCL_OK; }

int ncclCommAbort(void *which) {
    comm *of = which;
    if (!of) return NCCL_OK;
    while (atomic_load(&knobs[ABORT_HANGS])) usleep(1000);
    atomic_store(&of->is_aborted, 1);
    for (int i = 0; i < of->num_ranks; i++)
        if (of->socks[i] >= 0) shutdown(of->socks[i], SHUT_RDWR);
    atomic_fetch_sub(&num_comms, 1);
    let_go(of);
    return NCCL_OK;
}
