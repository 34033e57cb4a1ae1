/* A stand-in for libnvidia-ml.so.1: what the real binding calls, over a state file that tests read and write.
 *
 * The POWER MODEL IS INVENTED. It only makes energy grow, and grow faster at a higher clock. It says nothing
 * of any GPU: never train, tune or judge a policy on it.
 *
 * The state file is named by RLGOV_NVML_STUB and mapped when NVML is initialised; tests/fakes/nvml.py mirrors
 * its layout. Every function first looks whether a fault is planned for it.
 */

#include <fcntl.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15,
};
enum { MAX_GPUS = 8, MAX_CLOCKS = 64, MAX_FAULTS = 32, MAX_EVENTS = 16, MAX_WRITES = 1024, MAX_SETS = 8 };

enum { GPU_IDLE = 0x1, SW_POWER_CAP = 0x4 };

typedef struct {
    char uuid[64];
    char name[64];
    uint64_t memory_bytes;
    uint64_t reasons;         /* added to what the model gives */
    double energy_mj;
    double energy_at_s;       /* until when energy is counted */
    double load;              /* 0 idle .. 1 busy */
    uint32_t tdp_mw;
    uint32_t memory_clock_mhz;
    uint32_t clock_count;
    uint32_t clocks_mhz[MAX_CLOCKS]; /* descending */
    uint32_t locked_low_mhz;  /* 0: no lock */
    uint32_t locked_high_mhz;
    uint32_t ignores_locks;   /* accepts a lock and does nothing */
    uint32_t capped_mhz;      /* the power limit allows no more; 0: no such limit */
    uint32_t mig;
    uint32_t virtualization;
    uint32_t persistence;
    uint32_t compute_mode;
    uint32_t architecture;
    uint32_t lost;
    uint32_t no_field_values; /* field 186 is not there */
} Gpu;

typedef struct {
    char function[64]; /* empty: any */
    int32_t gpu;       /* -1: any */
    int32_t skip;      /* so many calls go well first */
    int32_t count;     /* then so many fail; -1: all */
    int32_t code;
} Fault;

typedef struct { int32_t gpu; uint32_t xid; } Event;
typedef struct { int32_t gpu; uint32_t low_mhz; uint32_t high_mhz; uint32_t reset; } Write;

typedef struct {
    uint32_t size;         /* of this struct, so that a layout that drifted apart is noticed */
    uint32_t gpu_count;
    uint32_t order[MAX_GPUS]; /* index -> number of the GPU */
    uint32_t sessions;     /* initialised and not shut down */
    uint32_t forgotten;    /* the driver was reloaded: sessions must initialise again */
    uint32_t unprivileged;
    uint32_t fault_count;
    uint32_t event_count;
    uint32_t write_count;
    uint32_t open_event_sets;
    uint32_t spare;
    double now_s;          /* 0: the machine's monotonic clock */
    double energy_step_s;  /* the counter moves in such steps */
    Fault faults[MAX_FAULTS];
    Event events[MAX_EVENTS];
    Write writes[MAX_WRITES];
    Gpu gpus[MAX_GPUS];
} State;

static State *state;
static uint32_t watched[MAX_SETS]; /* bit set of GPUs; the highest bit marks a set in use */

typedef struct { void *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } EventData;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency_us;
    uint32_t type, result;
    union { double d; unsigned u; unsigned long long ull; } value;
} FieldValue;

static int number_of(void *device)
{
    if (state == NULL) return -1;
    for (uint32_t i = 0; i < state->gpu_count; i++)
        if (device == (void *)&state->gpus[i]) return (int)i;
    return -1;
}

static int fault(const char *function, int gpu)
{
    for (uint32_t i = 0; i < state->fault_count; i++) {
        Fault *f = &state->faults[i];
        if (f->function[0] && strcmp(f->function, function) != 0) continue;
        if (f->gpu >= 0 && f->gpu != gpu) continue;
        if (f->skip > 0) { f->skip--; continue; }
        if (f->count == 0) continue;
        if (f->count > 0) f->count--;
        return f->code;
    }
    return OK;
}

static int enter(const char *function)
{
    if (state == NULL || state->sessions == 0 || state->forgotten) return UNINITIALIZED;
    return fault(function, -1);
}

static int enter_gpu(const char *function, void *device)
{
    if (state == NULL || state->sessions == 0 || state->forgotten) return UNINITIALIZED;
    int gpu = number_of(device);
    if (gpu < 0) return INVALID_ARGUMENT;
    if (state->gpus[gpu].lost) return GPU_IS_LOST;
    return fault(function, gpu);
}

#define ENTER() do { int code_ = enter(__func__); if (code_ != OK) return code_; } while (0)
#define ENTER_GPU() do { int code_ = enter_gpu(__func__, device); if (code_ != OK) return code_; } while (0)
#define GPU ((Gpu *)device)

static double now_s(void)
{
    if (state->now_s > 0) return state->now_s;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint32_t wanted_mhz(const Gpu *gpu)
{
    if (gpu->locked_high_mhz && !gpu->ignores_locks) return gpu->locked_high_mhz;
    return gpu->load > 0 ? gpu->clocks_mhz[0] : gpu->clocks_mhz[gpu->clock_count - 1];
}

static uint32_t measured_mhz(const Gpu *gpu)
{
    uint32_t mhz = wanted_mhz(gpu);
    return gpu->capped_mhz && gpu->capped_mhz < mhz ? gpu->capped_mhz : mhz;
}

/* INVENTED: a constant part, and with load a part that grows with the clock and one with its cube. */
static double power_mw(const Gpu *gpu)
{
    double clock = (double)measured_mhz(gpu) / gpu->clocks_mhz[0];
    return gpu->tdp_mw * (0.12 + gpu->load * (0.28 * clock + 0.6 * clock * clock * clock));
}

static void count_energy(Gpu *gpu)
{
    double until = now_s();
    if (state->energy_step_s > 0) until = floor(until / state->energy_step_s) * state->energy_step_s;
    if (gpu->energy_at_s > 0 && until > gpu->energy_at_s)
        gpu->energy_mj += power_mw(gpu) * (until - gpu->energy_at_s);
    if (until > gpu->energy_at_s) gpu->energy_at_s = until;
}

static void note_write(const Gpu *gpu, uint32_t low, uint32_t high, uint32_t reset)
{
    Write *w = &state->writes[state->write_count % MAX_WRITES];
    *w = (Write){(int32_t)(gpu - state->gpus), low, high, reset};
    state->write_count++;
}

static int put_text(char *into, unsigned length, const char *text)
{
    if (strlen(text) + 1 > length) return INSUFFICIENT_SIZE;
    strcpy(into, text);
    return OK;
}

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    if (state != NULL && (state->sessions == 0 || state->forgotten)) {
        munmap(state, sizeof(State));
        state = NULL;
    }
    if (state == NULL) {
        const char *path = getenv("RLGOV_NVML_STUB");
        int file = path ? open(path, O_RDWR) : -1;
        if (file < 0) return DRIVER_NOT_LOADED;
        void *mapped = mmap(NULL, sizeof(State), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
        if (mapped == MAP_FAILED) return DRIVER_NOT_LOADED;
        if (((State *)mapped)->size != sizeof(State)) { munmap(mapped, sizeof(State)); return DRIVER_NOT_LOADED; }
        state = mapped;
    }
    int code = fault(__func__, -1);
    if (code != OK) return code;
    if (state->forgotten) { state->forgotten = 0; state->sessions = 0; }
    state->sessions++;
    return OK;
}

int nvmlShutdown(void)
{
    ENTER();
    if (--state->sessions == 0) {
        munmap(state, sizeof(State));
        state = NULL;
        memset(watched, 0, sizeof watched);
    }
    return OK;
}

const char *nvmlErrorString(int code)
{
    static char text[32];
    snprintf(text, sizeof text, "stub error %d", code);
    return text;
}

int nvmlSystemGetDriverVersion(char *into, unsigned length) { ENTER(); return put_text(into, length, "580.0.stub"); }

int nvmlDeviceGetCount_v2(unsigned *count) { ENTER(); *count = state->gpu_count; return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device)
{
    ENTER();
    if (index >= state->gpu_count) return INVALID_ARGUMENT;
    *device = &state->gpus[state->order[index]];
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device)
{
    ENTER();
    for (uint32_t i = 0; i < state->gpu_count; i++)
        if (strcmp(state->gpus[i].uuid, uuid) == 0) { *device = &state->gpus[i]; return OK; }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *device, char *into, unsigned length) { ENTER_GPU(); return put_text(into, length, GPU->uuid); }

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} PciInfo;

/* A GPU keeps its address whatever its index. */
int nvmlDeviceGetPciInfo_v3(void *device, PciInfo *info)
{
    ENTER_GPU();
    unsigned bus = 0x21u + 0x20u * (unsigned)number_of(device);
    memset(info, 0, sizeof *info);
    info->bus = bus;
    snprintf(info->bus_id, sizeof info->bus_id, "00000000:%02X:00.0", bus);
    return OK;
}

int nvmlDeviceGetIndex(void *device, unsigned *index)
{
    ENTER_GPU();
    for (uint32_t i = 0; i < state->gpu_count; i++)
        if (state->order[i] == (uint32_t)number_of(device)) { *index = i; return OK; }
    return NOT_FOUND;
}

int nvmlDeviceGetName(void *device, char *into, unsigned length) { ENTER_GPU(); return put_text(into, length, GPU->name); }
int nvmlDeviceGetArchitecture(void *device, unsigned *value) { ENTER_GPU(); *value = GPU->architecture; return OK; }
int nvmlDeviceGetPersistenceMode(void *device, unsigned *value) { ENTER_GPU(); *value = GPU->persistence; return OK; }
int nvmlDeviceGetComputeMode(void *device, unsigned *value) { ENTER_GPU(); *value = GPU->compute_mode; return OK; }
int nvmlDeviceGetPowerManagementDefaultLimit(void *device, unsigned *mw) { ENTER_GPU(); *mw = GPU->tdp_mw; return OK; }
int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *mw) { ENTER_GPU(); *mw = GPU->tdp_mw; return OK; }

int nvmlDeviceGetVirtualizationMode(void *device, unsigned *value)
{
    ENTER_GPU();
    *value = GPU->virtualization;
    return OK;
}

int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *pending)
{
    ENTER_GPU();
    *now = *pending = GPU->mig;
    return OK;
}

int nvmlDeviceGetMemoryInfo(void *device, Memory *memory)
{
    ENTER_GPU();
    *memory = (Memory){GPU->memory_bytes, GPU->memory_bytes, 0};
    return OK;
}

int nvmlDeviceGetSupportedMemoryClocks(void *device, unsigned *count, unsigned *clocks)
{
    ENTER_GPU();
    if (clocks == NULL || *count < 1) { *count = 1; return INSUFFICIENT_SIZE; }
    *count = 1;
    clocks[0] = GPU->memory_clock_mhz;
    return OK;
}

int nvmlDeviceGetSupportedGraphicsClocks(void *device, unsigned memory_mhz, unsigned *count, unsigned *clocks)
{
    ENTER_GPU();
    if (memory_mhz != GPU->memory_clock_mhz) return NOT_FOUND;
    unsigned room = *count;
    *count = GPU->clock_count;
    if (clocks == NULL || room < GPU->clock_count) return INSUFFICIENT_SIZE;
    for (uint32_t i = 0; i < GPU->clock_count; i++) clocks[i] = GPU->clocks_mhz[i];
    return OK;
}

int nvmlDeviceGetClockInfo(void *device, unsigned type, unsigned *mhz)
{
    ENTER_GPU();
    *mhz = type == 2 ? GPU->memory_clock_mhz : measured_mhz(GPU);
    return OK;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *reasons)
{
    ENTER_GPU();
    *reasons = GPU->reasons | (measured_mhz(GPU) < wanted_mhz(GPU) ? SW_POWER_CAP : 0);
    if (GPU->load <= 0) *reasons |= GPU_IDLE;
    return OK;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons)
{
    ENTER_GPU();
    *reasons = GPU->reasons | (measured_mhz(GPU) < wanted_mhz(GPU) ? SW_POWER_CAP : 0);
    return OK;
}

int nvmlDeviceGetPowerUsage(void *device, unsigned *mw) { ENTER_GPU(); *mw = (unsigned)power_mw(GPU); return OK; }

int nvmlDeviceGetFieldValues(void *device, int count, FieldValue *values)
{
    ENTER_GPU();
    for (int i = 0; i < count; i++) {
        values[i].result = values[i].field == 186 && !GPU->no_field_values ? OK : NOT_SUPPORTED;
        values[i].type = 1;
        values[i].value.ull = 0;
        values[i].value.u = (unsigned)power_mw(GPU);
    }
    return OK;
}

int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *mj)
{
    ENTER_GPU();
    count_energy(GPU);
    *mj = (unsigned long long)GPU->energy_mj;
    return OK;
}

int nvmlDeviceSetGpuLockedClocks(void *device, unsigned low, unsigned high)
{
    ENTER_GPU();
    if (state->unprivileged) return NO_PERMISSION;
    if (low > high) return INVALID_ARGUMENT;
    count_energy(GPU);
    GPU->locked_low_mhz = low;
    GPU->locked_high_mhz = high;
    note_write(GPU, low, high, 0);
    return OK;
}

int nvmlDeviceResetGpuLockedClocks(void *device)
{
    ENTER_GPU();
    if (state->unprivileged) return NO_PERMISSION;
    count_energy(GPU);
    GPU->locked_low_mhz = GPU->locked_high_mhz = 0;
    note_write(GPU, 0, 0, 1);
    return OK;
}

int nvmlEventSetCreate(void **set)
{
    ENTER();
    for (int i = 0; i < MAX_SETS; i++)
        if (!watched[i]) {
            watched[i] = 0x80000000u;
            *set = &watched[i];
            state->open_event_sets++;
            return OK;
        }
    return INSUFFICIENT_SIZE;
}

int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set)
{
    ENTER_GPU();
    if (!(types & 0x8)) return INVALID_ARGUMENT;
    *(uint32_t *)set |= 1u << number_of(device);
    return OK;
}

int nvmlEventSetWait_v2(void *set, EventData *data, unsigned timeout_ms)
{
    (void)timeout_ms;
    ENTER();
    for (uint32_t i = 0; i < state->event_count; i++) {
        Event event = state->events[i];
        if (!(*(uint32_t *)set & (1u << event.gpu))) continue;
        *data = (EventData){&state->gpus[event.gpu], 0x8, event.xid, 0xffffffffu, 0xffffffffu};
        memmove(&state->events[i], &state->events[i + 1], (state->event_count - i - 1) * sizeof(Event));
        state->event_count--;
        return OK;
    }
    return TIMEOUT;
}

int nvmlEventSetFree(void *set)
{
    ENTER();
    *(uint32_t *)set = 0;
    state->open_event_sets--;
    return OK;
}
