/*
 * A stand-in for libnvidia-ml.so.1: the NVML calls that the daemon makes, answered from a text file.
 *
 * NVML_STANDIN        path of the file; standin.py writes it and describes its meaning. It is read again
 *                     at every call, so whoever replaces it (by rename) changes the machine.
 * NVML_STANDIN_CALLS  path of a file that gets one line, the function's name, for every call. Optional.
 *
 * -DNVML_STANDIN_AGE=-1 a driver to come: the older function for the temperature is gone
 * -DNVML_STANDIN_AGE=1  an old driver: no MIG, no version 2 of the memory, no version 3 of the processes
 * -DNVML_STANDIN_AGE=2  next to nothing: init, count, handle, UUID and version 1 of the memory
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifndef NVML_STANDIN_AGE
#define NVML_STANDIN_AGE 0
#endif

#define EXPORT __attribute__((visibility("default")))

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    GPU_IS_LOST = 15,
    ARGUMENT_VERSION_MISMATCH = 25,
    UNKNOWN = 999
};

enum { MAX_CARDS = 16, MAX_SLICES = 8, MAX_PROCESSES = 32, MEMORY_V2 = 0x02000028, TEMPERATURE_V1 = 0x0100000c };

typedef unsigned long long bytes;

struct process {
    char kind; /* c = compute, g = graphics, m = MPS */
    unsigned pid;
    bytes used;
};

struct device { /* a card or a slice of one */
    char uuid[96];
    char name[96];
    bytes total, used, reserved;
    int process_count;
    struct process processes[MAX_PROCESSES];
    int utilisation, temperature, power_mw, power_limit_mw; /* -1: not supported */
    int handle_error;
    /* of cards only */
    char pci[32];
    int error, memory_v2_error, mig, slice_count;
    /* of slices only */
    unsigned processor_slices;
    bytes memory_mb;
};

struct card {
    struct device self;
    struct device slices[MAX_SLICES];
};

struct machine {
    int init_error, count_error, at_init, count;
    long hang_ms;
    struct card cards[MAX_CARDS];
};

static int users; /* nvmlInit less nvmlShutdown */

/* The cards at nvmlInit. With `at_init` the driver lists these until the next one, as the real one does. */
static struct machine listed;

static int parse_card(const char *text, struct machine *machine) {
    if (machine->count == MAX_CARDS) return 0;
    struct device *it = &machine->cards[machine->count++].self;
    return sscanf(text, "%95s %31s %llu %llu %llu %d %d %d %d %95[^\n]", it->uuid, it->pci, &it->total, &it->used,
                  &it->reserved, &it->handle_error, &it->error, &it->memory_v2_error, &it->mig, it->name) == 10;
}

static struct device *parse_slice(const char *text, struct machine *machine) {
    if (machine->count == 0) return NULL;
    struct card *card = &machine->cards[machine->count - 1];
    if (card->self.slice_count == MAX_SLICES) return NULL;
    struct device *it = &card->slices[card->self.slice_count++];
    int fields = sscanf(text, "%95s %llu %llu %llu %d %u %llu %95[^\n]", it->uuid, &it->total, &it->used, &it->reserved,
                        &it->handle_error, &it->processor_slices, &it->memory_mb, it->name);
    return fields == 8 ? it : NULL;
}

static int parse_sensors(const char *text, struct device *it) {
    return it != NULL && sscanf(text, "%d %d %d %d", &it->utilisation, &it->temperature, &it->power_mw,
                                &it->power_limit_mw) == 4;
}

static int parse_process(const char *text, struct device *owner) {
    if (owner == NULL || owner->process_count == MAX_PROCESSES) return 0;
    struct process *it = &owner->processes[owner->process_count++];
    return sscanf(text, "%c %u %llu", &it->kind, &it->pid, &it->used) == 3;
}

/* 1 when the whole file was understood, its last line `end` included. */
static int parse(FILE *file, struct machine *machine) {
    char line[512];
    struct device *owner = NULL;
    while (fgets(line, sizeof line, file) != NULL) {
        if (strcmp(line, "end\n") == 0) return 1;
        int ok = 0;
        if (strncmp(line, "init ", 5) == 0) {
            ok = sscanf(line + 5, "%d", &machine->init_error) == 1;
        } else if (strncmp(line, "count ", 6) == 0) {
            ok = sscanf(line + 6, "%d", &machine->count_error) == 1;
        } else if (strncmp(line, "hang_ms ", 8) == 0) {
            ok = sscanf(line + 8, "%ld", &machine->hang_ms) == 1;
        } else if (strncmp(line, "at_init ", 8) == 0) {
            ok = sscanf(line + 8, "%d", &machine->at_init) == 1;
        } else if (strncmp(line, "card ", 5) == 0) {
            ok = parse_card(line + 5, machine);
            owner = &machine->cards[machine->count - 1].self;
        } else if (strncmp(line, "slice ", 6) == 0) {
            owner = parse_slice(line + 6, machine);
            ok = owner != NULL;
        } else if (strncmp(line, "sensors ", 8) == 0) {
            ok = parse_sensors(line + 8, owner);
        } else if (strncmp(line, "process ", 8) == 0) {
            ok = parse_process(line + 8, owner);
        }
        if (!ok) {
            fprintf(stderr, "nvml stand-in: cannot read: %s", line);
            return 0;
        }
    }
    fputs("nvml stand-in: the file has no end\n", stderr);
    return 0;
}

static struct machine *load(void) {
    const char *path = getenv("NVML_STANDIN");
    FILE *file = path == NULL ? NULL : fopen(path, "re");
    if (file == NULL) {
        fputs("nvml stand-in: NVML_STANDIN names no file that can be read\n", stderr);
        return NULL;
    }
    struct machine *machine = calloc(1, sizeof *machine);
    if (machine != NULL && !parse(file, machine)) {
        free(machine);
        machine = NULL;
    }
    fclose(file);
    return machine;
}

/* A card that was taken out keeps its index and answers that it is lost; one that was put in is not listed. */
static void keep_the_list(struct machine *machine) {
    struct machine now = *machine;
    machine->count = listed.count;
    for (int i = 0; i < listed.count; i++) {
        memset(&machine->cards[i], 0, sizeof machine->cards[i]);
        machine->cards[i].self.handle_error = GPU_IS_LOST;
        machine->cards[i].self.error = GPU_IS_LOST;
        for (int j = 0; j < now.count; j++)
            if (strcmp(now.cards[j].self.uuid, listed.cards[i].self.uuid) == 0) machine->cards[i] = now.cards[j];
    }
}

static long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void record(const char *function) {
    const char *path = getenv("NVML_STANDIN_CALLS");
    int file = path == NULL ? -1 : open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (file < 0) return;
    if (dprintf(file, "%s\n", function) < 0) perror("nvml stand-in");
    close(file);
}

/* The machine as it is once nothing hangs any more; NULL when its file cannot be read. */
static struct machine *enter(const char *function) {
    record(function);
    long begun = now_ms();
    for (;;) {
        struct machine *machine = load();
        if (machine != NULL && machine->at_init && users > 0) keep_the_list(machine);
        if (machine == NULL || now_ms() - begun >= machine->hang_ms) return machine;
        free(machine);
        usleep(2000);
    }
}

/* A handle is the number of the card and, above it, of the slice, both from 1. */
static void *handle_of(unsigned card, unsigned slice) { return (void *)(size_t)(card + (slice << 16)); }

static struct device *device_of(struct machine *machine, void *handle) {
    unsigned card = (size_t)handle & 0xffff, slice = (size_t)handle >> 16;
    if (card < 1 || card > (unsigned)machine->count) return NULL;
    struct card *it = &machine->cards[card - 1];
    if (slice == 0) return &it->self;
    return slice <= (unsigned)it->self.slice_count ? &it->slices[slice - 1] : NULL;
}

/* Runs the block with `machine`, then returns `result`, which the block may set. */
#define CALL(block)                                            \
    struct machine *machine = enter(__func__);                 \
    int result = machine == NULL ? UNKNOWN : SUCCESS;          \
    if (result == SUCCESS && users == 0) result = UNINITIALIZED; \
    if (result == SUCCESS) block                               \
    free(machine);                                             \
    return result;

/* The same for a call about one device, `it`. What names a card is known to the driver even if it is lost. */
#define DEVICE_CALL(naming, block)                                        \
    CALL({                                                                \
        struct device *it = device_of(machine, handle);                   \
        struct device *card = device_of(machine, handle_of((size_t)handle & 0xffff, 0)); \
        if (it == NULL) result = INVALID_ARGUMENT;                        \
        else if (!(naming)) result = card->error;                         \
        if (result == SUCCESS) block                                      \
    })

static int copy(char *target, unsigned size, const char *text) {
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(target, text);
    return SUCCESS;
}

EXPORT int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    struct machine *machine = enter(__func__);
    int result = machine == NULL ? UNKNOWN : machine->init_error;
    if (result == SUCCESS && users++ == 0) listed = *machine;
    free(machine);
    return result;
}

EXPORT int nvmlShutdown(void) { CALL({ users--; }) }

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
    CALL({
        result = machine->count_error;
        *count = machine->count;
    })
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    CALL({
        if (index >= (unsigned)machine->count) result = INVALID_ARGUMENT;
        else result = machine->cards[index].self.handle_error;
        *handle = handle_of(index + 1, 0);
    })
}

EXPORT int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
    DEVICE_CALL(1, { result = copy(text, size, it->uuid); })
}

struct memory {
    bytes total, free, used;
};

EXPORT int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory) {
    DEVICE_CALL(0, {
        memory->total = it->total;
        memory->used = it->used + it->reserved;
        memory->free = it->total - memory->used;
    })
}

#if NVML_STANDIN_AGE < 2
struct pci {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
};

EXPORT int nvmlDeviceGetPciInfo_v3(void *handle, struct pci *pci) {
    DEVICE_CALL(1, {
        memset(pci, 0, sizeof *pci);
        result = copy(pci->bus_id, sizeof pci->bus_id, it->pci);
    })
}

EXPORT int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
    DEVICE_CALL(1, { result = strcmp(it->name, "-") == 0 ? NOT_SUPPORTED : copy(text, size, it->name); })
}

struct process_info { /* versions 2 and 3 are the same */
    unsigned pid;
    bytes used;
    unsigned gpu_instance, compute_instance;
};

static int list(const struct device *it, char kind, unsigned *count, struct process_info *infos) {
    unsigned found = 0, room = *count;
    for (int i = 0; i < it->process_count; i++) {
        const struct process *process = &it->processes[i];
        if (process->kind != kind) continue;
        if (found < room && infos != NULL)
            infos[found] = (struct process_info){process->pid, process->used, ~0u, ~0u};
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

#define PROCESSES(name, kind)                                                          \
    EXPORT int name(void *handle, unsigned *count, struct process_info *infos) {       \
        DEVICE_CALL(0, { result = list(it, kind, count, infos); })                     \
    }

PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, 'c')
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, 'g')
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v2, 'm')

static int measure(int value, unsigned *target) {
    if (value < 0) return NOT_SUPPORTED;
    *target = value;
    return SUCCESS;
}

struct rates {
    unsigned gpu, memory;
};

EXPORT int nvmlDeviceGetUtilizationRates(void *handle, struct rates *rates) {
    DEVICE_CALL(0, {
        result = measure(it->utilisation, &rates->gpu);
        rates->memory = rates->gpu / 2;
    })
}

EXPORT int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    DEVICE_CALL(0, { result = measure(it->power_mw, milliwatts); })
}

EXPORT int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatts) {
    DEVICE_CALL(0, { result = measure(it->power_limit_mw, milliwatts); })
}

#if NVML_STANDIN_AGE >= 0
EXPORT int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *degrees) {
    DEVICE_CALL(0, { result = sensor == 0 ? measure(it->temperature, degrees) : INVALID_ARGUMENT; })
}
#endif
#endif

#if NVML_STANDIN_AGE < 1
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, 'c')
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, 'g')
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3, 'm')

struct temperature {
    unsigned version;
    int sensor, degrees;
};

EXPORT int nvmlDeviceGetTemperatureV(void *handle, struct temperature *it_is) {
    DEVICE_CALL(0, {
        unsigned degrees = 0;
        if (it_is->version != TEMPERATURE_V1) result = ARGUMENT_VERSION_MISMATCH;
        else result = it_is->sensor == 0 ? measure(it->temperature, &degrees) : INVALID_ARGUMENT;
        it_is->degrees = degrees;
    })
}

struct memory_v2 {
    unsigned version;
    bytes total, reserved, free, used;
};

EXPORT int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *memory) {
    DEVICE_CALL(0, {
        if (memory->version != MEMORY_V2) result = ARGUMENT_VERSION_MISMATCH;
        else result = it->memory_v2_error;
        memory->total = it->total;
        memory->reserved = it->reserved;
        memory->used = it->used;
        memory->free = it->total - it->used - it->reserved;
    })
}

EXPORT int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    DEVICE_CALL(0, {
        if (it->mig < 0) result = NOT_SUPPORTED;
        *current = *pending = it->mig > 0;
    })
}

EXPORT int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
    DEVICE_CALL(0, { *count = 2 * MAX_SLICES; })
}

/* Slices have even numbers only, as if every second one had been removed. */
EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **slice) {
    DEVICE_CALL(0, {
        if (index % 2 != 0 || index / 2 >= (unsigned)it->slice_count) result = NOT_FOUND;
        else result = machine->cards[((size_t)handle & 0xffff) - 1].slices[index / 2].handle_error;
        *slice = handle_of((size_t)handle & 0xffff, index / 2 + 1);
    })
}

struct attributes {
    unsigned multiprocessors, copy_engines, decoders, encoders, jpegs, ofas, gpu_slices, compute_slices;
    bytes memory_mb;
};

EXPORT int nvmlDeviceGetAttributes_v2(void *handle, struct attributes *attributes) {
    DEVICE_CALL(0, {
        if (it->memory_mb == 0) result = NOT_SUPPORTED;
        memset(attributes, 0, sizeof *attributes);
        attributes->gpu_slices = attributes->compute_slices = it->processor_slices;
        attributes->memory_mb = it->memory_mb;
    })
}
#endif
