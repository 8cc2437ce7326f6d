/* Make system calls of a process fail: LD_PRELOAD=shim.so FAULTS='OP:ACTION:PATH:AFTER:COUNT;...'.

   OP      open, write, sync, rename, mkdir, unlink, read
   ACTION  an errno (ENOSPC, EIO, EDQUOT, EROFS, EACCES), SHORT (half of a write), KILL or TERM (a signal to the process, then the call)
   PATH    part of the file's path
   AFTER   matching calls that still succeed
   COUNT   calls that fail after these; 0: all

   FAULTS_LOG names a file that gets a line for every call that was made to fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE = 0, SHORT = -1 };
struct fault { char op[8], path[256]; int action, signal; long after, count; atomic_long seen; };
static struct fault faults[16];
static int known;
static int ready;

static int number_of(const char *name) {
    if (!strcmp(name, "ENOSPC")) return ENOSPC;
    if (!strcmp(name, "EIO")) return EIO;
    if (!strcmp(name, "EDQUOT")) return EDQUOT;
    if (!strcmp(name, "EROFS")) return EROFS;
    if (!strcmp(name, "EACCES")) return EACCES;
    if (!strcmp(name, "SHORT")) return SHORT;
    return NONE;
}

/* Read FAULTS, again where it has changed: a fork may get other faults than the process that it comes from. */
static void setup(void) {
    static char current[4096];
    static atomic_flag busy = ATOMIC_FLAG_INIT;
    const char *text = getenv("FAULTS");
    char copy[4096], *save = NULL;
    if (!text) text = "";
    if (strlen(text) >= sizeof copy || (ready && !strcmp(text, current)) || atomic_flag_test_and_set(&busy)) return;
    strcpy(copy, text);
    strcpy(current, text);
    known = 0;
    for (char *one = strtok_r(copy, ";", &save); one && known < 16; one = strtok_r(NULL, ";", &save)) {
        char action[16] = "";
        struct fault *f = &faults[known];
        if (sscanf(one, "%7[^:]:%15[^:]:%255[^:]:%ld:%ld", f->op, action, f->path, &f->after, &f->count) != 5) continue;
        f->action = number_of(action);
        f->signal = !strcmp(action, "KILL") ? SIGKILL : !strcmp(action, "TERM") ? SIGTERM : 0;
        atomic_store(&f->seen, 0);
        known++;
    }
    ready = 1;
    atomic_flag_clear(&busy);
}

static void note(const char *op, const char *path) {
    const char *log = getenv("FAULTS_LOG");
    char line[600];
    if (!log) return;
    int file = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (file < 0) return;
    int size = snprintf(line, sizeof line, "%s %s\n", op, path);
    (void)!syscall(SYS_write, file, line, (size_t)(size < (int)sizeof line ? size : (int)sizeof line - 1));
    syscall(SYS_close, file);
}

/* What to do with this call: NONE, SHORT or an errno. */
static int fate(const char *op, const char *path) {
    setup();
    if (!path) return NONE;
    for (int i = 0; i < known; i++) {
        struct fault *f = &faults[i];
        if (strcmp(f->op, op) || !strstr(path, f->path)) continue;
        long turn = atomic_fetch_add(&f->seen, 1);
        if (turn < f->after || (f->count && turn >= f->after + f->count)) continue;
        note(op, path);
        if (f->signal) kill(getpid(), f->signal);
        else return f->action;
    }
    return NONE;
}

static int fate_of_file(const char *op, int file) {
    char link[64], path[1024];
    setup();
    if (!known) return NONE;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (size < 0) return NONE;
    path[size] = 0;
    return fate(op, path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(number) do { int _n = (number); if (_n > 0) { errno = _n; return -1; } } while (0)


#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); }
int open(const char *path, int flags, ...) { MODE FAIL(fate("open", path)); return NEXT(open)(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE FAIL(fate("open", path)); return NEXT(open64)(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE FAIL(fate("open", path)); return NEXT(openat)(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE FAIL(fate("open", path)); return NEXT(openat64)(at, path, flags, mode); }

#define HALF(size, found) ((found) == SHORT && (size) > 1 ? (size) / 2 : (size))
ssize_t write(int file, const void *data, size_t size) {
    int found = fate_of_file("write", file);
    FAIL(found);
    return NEXT(write)(file, data, HALF(size, found));
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    int found = fate_of_file("write", file);
    FAIL(found);
    return NEXT(pwrite64)(file, data, HALF(size, found), at);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    FAIL(fate_of_file("write", file));
    return NEXT(writev)(file, parts, count);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    static ssize_t (*next)(int, int, off64_t *, size_t);
    FAIL(fate_of_file("write", to));
    if (!next) next = (ssize_t(*)(int, int, off64_t *, size_t))dlsym(RTLD_NEXT, "sendfile64");
    return next(to, from, at, size);
}
ssize_t read(int file, void *data, size_t size) { FAIL(fate_of_file("read", file)); return NEXT(read)(file, data, size); }
int fsync(int file) { FAIL(fate_of_file("sync", file)); return NEXT(fsync)(file); }
int fdatasync(int file) { FAIL(fate_of_file("sync", file)); return NEXT(fdatasync)(file); }
int rename(const char *from, const char *to) { FAIL(fate("rename", to)); return NEXT(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { FAIL(fate("rename", to)); return NEXT(renameat)(a, from, b, to); }
int mkdir(const char *path, mode_t mode) { FAIL(fate("mkdir", path)); return NEXT(mkdir)(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { FAIL(fate("mkdir", path)); return NEXT(mkdirat)(at, path, mode); }
int unlink(const char *path) { FAIL(fate("unlink", path)); return NEXT(unlink)(path); }
int unlinkat(int at, const char *path, int flags) { FAIL(fate("unlink", path)); return NEXT(unlinkat)(at, path, flags); }
