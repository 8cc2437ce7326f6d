/* A stand-in for libnvidia-ml.so.1 with the ABI that nvidia-ml-py calls. The box it plays is the text file $FAKE_NVML:
 *
 *   init CODE                                       what nvmlInit returns; 0 is success
 *   driver TEXT / cuda NUMBER                       580.95.05 / 13000
 *   gpu UUID BUS MAJOR MINOR BYTES MILLIWATTS MIG NAME...   MIG: 1 on, 0 off, -1 not supported (as on GeForce)
 *   mig SLOT UUID BYTES NAME...                     an instance of the GPU above
 *   link gpu|switch|npu BUS [down]                  one more NVLink of the GPU above
 *   state NAME NUMBER                               how the GPU above stands: reasons clock maxclock celsius usual (milliwatts)
 *                                                   persistent ecc uncorrected width maxwidth used (bytes) busy (%)
 *                                                   drawn (milliwatts) memclock; and growth with every reading: energy
 *                                                   (millijoules) linked (KiB); pcie (KB per second)
 *   fail FUNCTION CODE [INDEX]                      this function returns CODE, for one GPU or for all
 *   lost INDEX COUNT                                this GPU is lost once its utilization was read COUNT times
 *
 * A number of -1 makes its getter return NOT_SUPPORTED.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
enum { REASONS, CLOCK, MAXCLOCK, CELSIUS, USUAL, PERSISTENT, ECC, UNCORRECTED, WIDTH, MAXWIDTH, USED,
       BUSY, DRAWN, MEMCLOCK, ENERGY, LINKED, PCIE, MAX_STATES };
static const char *state_names[MAX_STATES] = {"reasons",    "clock", "maxclock",    "celsius", "usual",   "persistent",
                                              "ecc",        "uncorrected", "width", "maxwidth", "used",
                                              "busy",       "drawn", "memclock",    "energy",  "linked",  "pcie"};
enum { MAX_GPUS = 16, MAX_LINKS = 36, MAX_SLOTS = 7, MAX_FAILS = 16 };

typedef struct Device {
  char uuid[96], bus[32], name[96];
  int major, minor, mig, index, links, link_kind[MAX_LINKS], link_up[MAX_LINKS];
  long long bytes, milliwatts, state[MAX_STATES];
  char link_bus[MAX_LINKS][32];
  struct Device *slots[MAX_SLOTS], *parent;
} Device;

typedef struct {
  char legacy[16];
  unsigned int domain, bus, device, pci_device, pci_subsystem;
  char id[32];
} PciInfo;

typedef struct {
  unsigned long long total, free, used;
} Memory;

static Device gpus[MAX_GPUS];
static int count, init_code, cuda = 13000, fails, lost_index, lost_after;
static char driver[64] = "580.95.05";
static struct { char function[64]; int code, index; } failing[MAX_FAILS];

static void load(void) {
  char line[512], word[64], extra[64];
  const char *path = getenv("FAKE_NVML");
  FILE *file = path ? fopen(path, "r") : NULL;
  count = init_code = fails = 0;
  lost_index = -1;
  while (file && fgets(line, sizeof line, file)) {
    Device *last = count ? &gpus[count - 1] : NULL;
    if (sscanf(line, "init %d", &init_code) == 1 || sscanf(line, "driver %63s", driver) == 1 ||
        sscanf(line, "cuda %d", &cuda) == 1)
      continue;
    if (!strncmp(line, "gpu ", 4) && count < MAX_GPUS) {
      Device *gpu = &gpus[count];
      memset(gpu, 0, sizeof *gpu);
      gpu->index = count++;
      for (int i = 0; i < MAX_STATES; i++) gpu->state[i] = i == USED ? 0 : -1;
      sscanf(line, "gpu %95s %31s %d %d %lld %lld %d %95[^\n]", gpu->uuid, gpu->bus, &gpu->major, &gpu->minor, &gpu->bytes,
             &gpu->milliwatts, &gpu->mig, gpu->name);
    } else if (!strncmp(line, "mig ", 4) && last) {
      Device *instance = calloc(1, sizeof *instance);
      int slot = 0;
      sscanf(line, "mig %d %95s %lld %95[^\n]", &slot, instance->uuid, &instance->bytes, instance->name);
      instance->index = last->index;
      instance->milliwatts = instance->major = -1;
      instance->parent = last;
      last->slots[slot % MAX_SLOTS] = instance;
    } else if (!strncmp(line, "state ", 6) && last) {
      long long number = -1;
      sscanf(line, "state %63s %lld", word, &number);
      for (int i = 0; i < MAX_STATES; i++)
        if (!strcmp(word, state_names[i])) last->state[i] = number;
    } else if (!strncmp(line, "link ", 5) && last && last->links < MAX_LINKS) {
      int found = sscanf(line, "link %63s %31s %63s", word, last->link_bus[last->links], extra);
      last->link_kind[last->links] = !strcmp(word, "gpu") ? 0 : !strcmp(word, "npu") ? 1 : 2;
      last->link_up[last->links++] = found < 3;
    } else if (!strncmp(line, "lost ", 5)) {
      sscanf(line, "lost %d %d", &lost_index, &lost_after);
    } else if (!strncmp(line, "fail ", 5) && fails < MAX_FAILS) {
      failing[fails].index = -1;
      sscanf(line, "fail %63s %d %d", failing[fails].function, &failing[fails].code, &failing[fails].index);
      fails++;
    }
  }
  if (file) fclose(file);
}

static int failed(const char *function, int index) {
  if (index >= 0 && index == lost_index && lost_after <= 0) return 15;
  for (int i = 0; i < fails; i++)
    if (!strcmp(failing[i].function, function) && (failing[i].index < 0 || failing[i].index == index)) return failing[i].code;
  return SUCCESS;
}

#define FAIL(index)                         \
  do {                                      \
    int code = failed(__func__, index);     \
    if (code != SUCCESS) return code;       \
  } while (0)

static int put(char *into, unsigned int size, const char *text) {
  snprintf(into, size, "%s", text);
  return SUCCESS;
}

int nvmlInitWithFlags(unsigned int flags) {
  (void)flags;
  load();
  return init_code;
}

int nvmlShutdown(void) {
  FAIL(-1);
  return SUCCESS;
}

const char *nvmlErrorString(int code) {
  switch (code) {
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 9: return "Driver Not Loaded";
    case 13: return "Function Not Found";
    case 15: return "GPU is lost";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
  }
}

int nvmlSystemGetDriverVersion(char *into, unsigned int size) {
  FAIL(-1);
  return put(into, size, driver);
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
  FAIL(-1);
  *version = cuda;
  return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned int *number) {
  FAIL(-1);
  *number = count;
  return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device) {
  FAIL((int)index);
  if ((int)index >= count) return INVALID_ARGUMENT;
  *device = &gpus[index];
  return SUCCESS;
}

int nvmlDeviceGetUUID(Device *device, char *into, unsigned int size) {
  FAIL(device->index);
  return put(into, size, device->uuid);
}

int nvmlDeviceGetName(Device *device, char *into, unsigned int size) {
  FAIL(device->index);
  return put(into, size, device->name);
}

int nvmlDeviceGetPciInfo_v3(Device *device, PciInfo *info) {
  FAIL(device->index);
  memset(info, 0, sizeof *info);
  return put(info->id, sizeof info->id, device->bus);
}

int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) {
  FAIL(device->index);
  if (device->major < 0) return NOT_SUPPORTED;
  *major = device->major;
  *minor = device->minor;
  return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
  FAIL(device->index);
  if (device->bytes < 0) return NOT_SUPPORTED;
  memory->total = device->bytes;
  memory->used = device->state[USED];
  memory->free = memory->total - memory->used;
  return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(Device *device, unsigned int *milliwatts) {
  FAIL(device->index);
  if (device->milliwatts < 0) return NOT_SUPPORTED;
  *milliwatts = device->milliwatts;
  return SUCCESS;
}

int nvmlDeviceGetMigMode(Device *device, unsigned int *current, unsigned int *pending) {
  FAIL(device->index);
  if (device->mig < 0) return NOT_SUPPORTED;
  *current = *pending = device->mig;
  return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned int *number) {
  FAIL(device->index);
  *number = MAX_SLOTS;
  return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned int slot, Device **instance) {
  FAIL(device->index);
  if (slot >= MAX_SLOTS || !device->slots[slot]) return NOT_FOUND;
  *instance = device->slots[slot];
  return SUCCESS;
}

int nvmlDeviceGetNvLinkState(Device *device, unsigned int link, int *active) {
  FAIL(device->index);
  if (!device->links) return NOT_SUPPORTED;
  if ((int)link >= device->links) return INVALID_ARGUMENT;
  *active = device->link_up[link];
  return SUCCESS;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(Device *device, unsigned int link, int *kind) {
  FAIL(device->index);
  *kind = device->link_kind[link];
  return SUCCESS;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(Device *device, unsigned int link, PciInfo *info) {
  FAIL(device->index);
  memset(info, 0, sizeof *info);
  return put(info->id, sizeof info->id, device->link_bus[link]);
}

/* One number of the GPU's state, as the getter's type has it. */
#define TELL(which, into, kind)                     \
  do {                                              \
    FAIL(device->index);                            \
    if (device->state[which] < 0) return NOT_SUPPORTED; \
    *(into) = (kind)device->state[which];           \
    return SUCCESS;                                 \
  } while (0)

int nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, unsigned long long *bits) { TELL(REASONS, bits, unsigned long long); }

int nvmlDeviceGetClockInfo(Device *device, int kind, unsigned int *clock) {
  if (kind == 2) TELL(MEMCLOCK, clock, unsigned int); /* NVML_CLOCK_MEM */
  if (kind != 1) return INVALID_ARGUMENT;             /* NVML_CLOCK_SM */
  TELL(CLOCK, clock, unsigned int);
}

int nvmlDeviceGetMaxClockInfo(Device *device, int kind, unsigned int *clock) {
  if (kind != 1) return INVALID_ARGUMENT;
  TELL(MAXCLOCK, clock, unsigned int);
}

int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned int *celsius) {
  if (sensor != 0) return INVALID_ARGUMENT;
  TELL(CELSIUS, celsius, unsigned int);
}

int nvmlDeviceGetPowerManagementDefaultLimit(Device *device, unsigned int *milliwatts) { TELL(USUAL, milliwatts, unsigned int); }

int nvmlDeviceGetPersistenceMode(Device *device, int *mode) { TELL(PERSISTENT, mode, int); }

int nvmlDeviceGetEccMode(Device *device, int *current, int *pending) {
  *pending = 0;
  TELL(ECC, current, int);
}

int nvmlDeviceGetTotalEccErrors(Device *device, int kind, int counter, unsigned long long *errors) {
  if (kind != 1 || counter != 0) return INVALID_ARGUMENT; /* uncorrected, since the driver was loaded */
  TELL(UNCORRECTED, errors, unsigned long long);
}

int nvmlDeviceGetCurrPcieLinkWidth(Device *device, unsigned int *lanes) { TELL(WIDTH, lanes, unsigned int); }

int nvmlDeviceGetMaxPcieLinkWidth(Device *device, unsigned int *lanes) { TELL(MAXWIDTH, lanes, unsigned int); }

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
  for (int i = 0; i < count; i++) {
    if (!strcmp(gpus[i].uuid, uuid)) {
      *device = &gpus[i];
      return SUCCESS;
    }
    for (int slot = 0; slot < MAX_SLOTS; slot++)
      if (gpus[i].slots[slot] && !strcmp(gpus[i].slots[slot]->uuid, uuid)) {
        *device = gpus[i].slots[slot];
        return SUCCESS;
      }
  }
  return NOT_FOUND;
}

int nvmlDeviceGetUtilizationRates(Device *device, unsigned int rates[2]) {
  FAIL(device->index);
  if (device->index == lost_index) lost_after--;
  rates[1] = 0;
  TELL(BUSY, rates, unsigned int);
}

int nvmlDeviceGetPowerUsage(Device *device, unsigned int *milliwatts) { TELL(DRAWN, milliwatts, unsigned int); }

int nvmlDeviceGetPcieThroughput(Device *device, int counter, unsigned int *kilobytes) {
  (void)counter;
  TELL(PCIE, kilobytes, unsigned int);
}

int nvmlDeviceGetTotalEnergyConsumption(Device *device, unsigned long long *millijoules) {
  static long long readings[MAX_GPUS];
  FAIL(device->index);
  if (device->state[ENERGY] < 0) return NOT_SUPPORTED;
  *millijoules = device->state[ENERGY] * ++readings[device->index];
  return SUCCESS;
}

typedef struct {
  unsigned int field, scope;
  long long timestamp, latency;
  int type, code;
  union {
    double real;
    unsigned long long whole;
  } value;
} FieldValue;

int nvmlDeviceGetFieldValues(Device *device, int number, FieldValue *fields) {
  static long long readings[MAX_GPUS];
  FAIL(device->index);
  for (int i = 0; i < number; i++) {
    fields[i].code = device->state[LINKED] < 0 ? NOT_SUPPORTED : SUCCESS;
    fields[i].value.whole = device->state[LINKED] * ++readings[device->index];
  }
  return SUCCESS;
}
