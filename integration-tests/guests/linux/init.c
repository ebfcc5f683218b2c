// The first and only process of the Linux test guest.
//
// It counts aloud once a second (with `beat=MS` in the kernel's command line: so often) on the serial console and on its disk, so that a test can see that a guest went on where
// it was, and that nobody else wrote to its disk. It knows nothing of uncloud. What it says, a line each:
//
//   READY <n> boot <id>         it has started; n is the counter that it found on its disk
//   COUNT <n> boot <id>         one beat: n is on the disk (decimal, one more than the last)
//   SPLITBRAIN <n> boot <id>    the disk says something that this guest did not write
//   NODISK                      there is no /dev/vda: it counts in memory only
//   DISKERROR <what>: <why>     a read or write failed; the beat did not count
//   ECHO <line>                 what was typed on the console
//   FIRMWARE uefi|bios          what booted the machine
//   SEED <file>: <line>         with `seed` in the kernel's command line: what is on the disk for cloud-init, line by line
//   NOSEED <what>: <why>        ... and why it could not be read
//   BYE                         the power button was pressed, or `poweroff` typed; it powers itself off
//
// If the machine has a channel to a guest agent, it answers there like one that knows a few commands: the synchronisation, the
// network's interfaces, which it makes up (10.0.2.15 and fd00::15 on eth0, and what nobody should be shown), and to freeze and thaw
// its file systems, of which it only says that it was told, FROZEN, THAWED, and remembers until it is started again.
//
// With `dirty=KIB` it writes into each page of so much memory again and again, `rate=KIB` of it in a second (default: all of it
// in each second): a guest that is not easy to migrate. Each time it looks whether what it wrote the last time is there:
//
//   MEMORYLOST <page> boot <id>  it is not
//
// Typed lines that do something: `panic` crashes the kernel, `poweroff` powers off, `reboot` resets the machine, `size` has it
// say how large the disk is (SIZE <bytes>), `fill A B` writes to the disk from MiB A to MiB B (FILLED A B, when that is done).
//
// The disk: sector 0 has the text "COUNT <n> boot <id>", written with O_DIRECT | O_DSYNC.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/input.h>
#include <net/if.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { SECTOR = 512, DISK_WAIT_MS = 5000 };

// In the order in which they must be loaded. The build takes the names from here.
// modules-begin
static const char *const MODULES[] = {
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_console",
    "evdev",
    "button",
    "pvpanic",
    "pvpanic-mmio",
    "pvpanic-pci",
};
// Loaded only to read the disk for cloud-init.
static const char *const FAT_MODULES[] = {
    "nls_cp437",
    "nls_ascii",
    "nls_utf8",
    "fat",
    "vfat",
};
// Loaded only when a test types `scsi`.
static const char *const SCSI_MODULES[] = {
    "scsi_common",
    "scsi_mod",
    "sd_mod",
    "virtio_scsi",
};
// modules-end

static char boot_id[37];
static char sector[SECTOR] __attribute__((aligned(SECTOR)));

// One line, written at once, so that lines do not mix.
static void say(const char *format, ...) {
  char line[1200];
  va_list args;
  va_start(args, format);
  int n = vsnprintf(line, sizeof line - 2, format, args);
  va_end(args);
  if (n > (int)sizeof line - 3) n = sizeof line - 3;
  line[n++] = '\n';
  for (int at = 0; at < n;) {
    ssize_t written = write(STDOUT_FILENO, line + at, n - at);
    if (written < 0 && errno != EINTR) return;
    if (written > 0) at += written;
  }
}

static int64_t now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

static void load_modules(const char *const *names, size_t count) {
  for (size_t i = 0; i < count; i++) {
    char path[64];
    snprintf(path, sizeof path, "/modules/%s.ko", names[i]);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) != 0) say("MODULE %s: %s", names[i], strerror(errno));
    if (fd >= 0) close(fd);
  }
}

// Where what follows a word in the kernel's command line begins. NULL: it has no such word.
static const char *told(const char *word) {
  static char line[4096];
  line[0] = ' ';
  int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
  ssize_t n = fd < 0 ? -1 : read(fd, line + 1, sizeof line - 3);
  if (fd >= 0) close(fd);
  if (n < 0) return NULL;
  strcpy(line + n + 1, " ");
  for (char *c = line; *c; c++) if (*c == '\n') *c = ' ';
  char wanted[64];
  snprintf(wanted, sizeof wanted, " %s", word);
  const char *found = strstr(line, wanted);
  return found ? found + strlen(wanted) : NULL;
}

// The number behind a word that ends with `=`.
static long told_number(const char *word, long otherwise) {
  const char *found = told(word);
  long number = found ? strtol(found, NULL, 10) : 0;
  return number > 0 ? number : otherwise;
}

enum { PAGE = 4096, WORDS = PAGE / sizeof(uint64_t), LOAD_EVERY_MS = 10 };

// Memory that is written to all the time, so that a migration has to send it again and again. The first word of each page says
// how often the page has been written to.
static struct {
  volatile uint64_t *memory;
  size_t pages, at;
  uint64_t pass;
  int64_t since_ms;
  long pages_per_second;
} load;

static void start_load(void) {
  long kib = told_number("dirty=", 0);
  if (kib == 0) return;
  load.pages = kib * 1024 / PAGE;
  load.pages_per_second = told_number("rate=", kib) * 1024 / PAGE;
  void *memory = mmap(NULL, load.pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return say("LOAD: %s", strerror(errno));
  load.memory = memory;
  // So that no page is like another, or nothing but zeros, which is sent in no time.
  for (size_t i = 0; i < load.pages * WORDS; i++) load.memory[i] = i % WORDS == 0 ? 0 : i * 0x9e3779b97f4a7c15;
  load.since_ms = now_ms();
}

// Writes what is due since the last time.
static void write_load(void) {
  int64_t now = now_ms(), due = (now - load.since_ms) * load.pages_per_second / 1000;
  if (due > (int64_t)load.pages) due = load.pages;
  if (due == 0) return;
  load.since_ms = now;
  for (; due > 0; due--) {
    volatile uint64_t *page = load.memory + load.at * WORDS;
    if (*page != load.pass) say("MEMORYLOST %zu boot %s", load.at, boot_id);
    *page = load.pass + 1;
    if (++load.at == load.pages) load.at = 0, load.pass++;
  }
}

// Says what is in a file of the disk for cloud-init.
static void say_file(const char *name) {
  char path[64], text[4096];
  snprintf(path, sizeof path, "/seed/%s", name);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return;
  ssize_t n = read(fd, text, sizeof text - 1);
  close(fd);
  text[n > 0 ? n : 0] = 0;
  for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) say("SEED %s: %s", name, line);
}

// Finds the disk whose file system has the label CIDATA, and says what is on it.
static void read_seed(void) {
  load_modules(FAT_MODULES, sizeof FAT_MODULES / sizeof *FAT_MODULES);
  for (int64_t end = now_ms() + DISK_WAIT_MS; now_ms() < end; usleep(20000)) {
    for (char letter = 'a'; letter <= 'e'; letter++) {
      char path[] = "/dev/vda", boot[SECTOR];
      path[7] = letter;
      int fd = open(path, O_RDONLY | O_CLOEXEC);
      if (fd < 0) continue;
      ssize_t n = pread(fd, boot, SECTOR, 0);
      close(fd);
      // The label of FAT12 and FAT16.
      if (n != SECTOR || memcmp(boot + 43, "CIDATA     ", 11) != 0) continue;
      mkdir("/seed", 0755);
      if (mount(path, "/seed", "vfat", MS_RDONLY, "") != 0) return say("NOSEED mount: %s", strerror(errno));
      say_file("meta-data");
      say_file("user-data");
      say_file("network-config");
      return;
    }
  }
  say("NOSEED look: no disk has the label CIDATA");
}

// Brings the network interfaces up: the kernel then gives each its link-local IPv6 address, made from its MAC address, and answers
// there. Without any: nothing.
static void network_up(void) {
  int control = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  for (int i = 0; control >= 0 && i < 8; i++) {
    struct ifreq request = {0};
    snprintf(request.ifr_name, sizeof request.ifr_name, "eth%d", i);
    if (ioctl(control, SIOCGIFFLAGS, &request) != 0) break;
    request.ifr_flags |= IFF_UP;
    if (ioctl(control, SIOCSIFFLAGS, &request) != 0) say("NONETWORK %s: %s", request.ifr_name, strerror(errno));
  }
  if (control >= 0) close(control);
}

static int open_power_button(void) {
  for (int i = 0; i < 8; i++) {
    char path[32], name[64] = "";
    snprintf(path, sizeof path, "/dev/input/event%d", i);
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) continue;
    ioctl(fd, EVIOCGNAME(sizeof name - 1), name);
    if (strcmp(name, "Power Button") == 0) return fd;
    close(fd);
  }
  return -1;
}

// The port of the agent's channel, which appears a moment after its driver. Without one: none.
static int open_agent_port(void) {
  int devices = 0;
  for (int i = 0; i < 16; i++) {
    char path[64];
    snprintf(path, sizeof path, "/sys/bus/virtio/drivers/virtio_console/virtio%d", i);
    devices += access(path, F_OK) == 0;
  }
  if (devices == 0) return -1;
  for (int64_t end = now_ms() + 1000; now_ms() < end; usleep(20000)) {
    for (int i = 0; i < 4; i++) {
      char path[64], name[32] = "";
      snprintf(path, sizeof path, "/sys/class/virtio-ports/vport%dp1/name", i);
      int fd = open(path, O_RDONLY | O_CLOEXEC);
      if (fd < 0) continue;
      ssize_t n = read(fd, name, sizeof name - 1);
      close(fd);
      if (n <= 0 || strncmp(name, "org.qemu.guest_agent.0", 22) != 0) continue;
      snprintf(path, sizeof path, "/dev/vport%dp1", i);
      return open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    }
  }
  return -1;
}

// The agent hears and says nothing.
static int deaf;

// How many of its file systems stand still.
static int frozen;

static void asked(int port, const char *line) {
  if (deaf) return;
  char answer[600];
  const char *id = strstr(line, "\"id\":");
  if (strstr(line, "guest-sync-delimited") && id)
    snprintf(answer, sizeof answer, "\xff{\"return\": %llu}\n", strtoull(id + 5, NULL, 10));
  else if (strstr(line, "guest-network-get-interfaces"))
    snprintf(answer, sizeof answer,
             "{\"return\": [{\"name\": \"lo\", \"ip-addresses\": [{\"ip-address\": \"127.0.0.1\", \"prefix\": 8}]}, "
             "{\"name\": \"eth0\", \"ip-addresses\": [{\"ip-address\": \"fe80::1\"}, {\"ip-address\": \"10.0.2.15\"}, "
             "{\"ip-address\": \"fd00::15\"}, {\"ip-address\": \"no address\"}]}]}\n");
  else if (strstr(line, "guest-fsfreeze-")) {
    int thaw = strstr(line, "-thaw") != NULL;
    say(thaw ? "THAWED" : "FROZEN");
    snprintf(answer, sizeof answer, "{\"return\": %d}\n", thaw ? frozen : 1);
    frozen = !thaw;
  } else
    snprintf(answer, sizeof answer, "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"not known\"}}\n");
  if (write(port, answer, strlen(answer)) < 0) say("AGENT: %s", strerror(errno));
}

// Puts what comes from the host together to lines. 0xff ends what came before it.
static void read_agent(int port) {
  static char line[1024];
  static size_t length;
  char bytes[256];
  ssize_t n = read(port, bytes, sizeof bytes);
  for (ssize_t i = 0; i < n; i++) {
    if (bytes[i] == (char)0xff) {
      length = 0;
    } else if (bytes[i] != '\n') {
      if (length < sizeof line - 1) line[length++] = bytes[i];
    } else {
      line[length] = 0;
      length = 0;
      asked(port, line);
    }
  }
}

// The disk appears a moment after its driver.
static int open_disk(void) {
  for (int64_t end = now_ms() + DISK_WAIT_MS; now_ms() < end; usleep(20000)) {
    int fd = open("/dev/vda", O_RDWR | O_DIRECT | O_DSYNC | O_CLOEXEC);
    if (fd >= 0) return fd;
    // A machine without a disk has no virtio-blk device in /sys: no need to wait.
    if (access("/sys/bus/virtio/drivers/virtio_blk/virtio0", F_OK) != 0 && now_ms() > end - DISK_WAIT_MS + 1000) break;
  }
  return -1;
}

static void power_off(void) {
  say("BYE");
  tcdrain(STDOUT_FILENO);
  sync();
  reboot(RB_POWER_OFF);
}

// How large the disk is, as the kernel says.
static void say_size(void) {
  unsigned long long bytes = 0;
  int fd = open("/dev/vda", O_RDONLY | O_CLOEXEC);
  if (fd < 0 || ioctl(fd, BLKGETSIZE64, &bytes) != 0) say("SIZE unknown: %s", strerror(errno));
  else say("SIZE %llu", bytes);
  if (fd >= 0) close(fd);
}

// Writes into each 64 KiB of the disk from one MiB to another: a qcow2 file must grow by as much.
static void fill(unsigned from, unsigned to) {
  static char text[SECTOR] __attribute__((aligned(SECTOR)));
  int fd = open("/dev/vda", O_WRONLY | O_DIRECT | O_DSYNC | O_CLOEXEC);
  memset(text, 'f', SECTOR);
  for (uint64_t at = (uint64_t)from << 20; fd >= 0 && at < (uint64_t)to << 20; at += 64 << 10) {
    if (pwrite(fd, text, SECTOR, (off_t)at) != SECTOR) {
      say("DISKERROR fill: %s", strerror(errno));
      break;
    }
  }
  if (fd >= 0) close(fd);
  say("FILLED %u %u", from, to);
}

// The serial numbers of the SCSI disks that there are, behind the word that was typed.
static void say_disks(const char *tag) {
  char text[900] = "";
  size_t length = 0;
  for (char name = 'a'; name <= 'p'; name++) {
    char path[64], page[256];
    snprintf(path, sizeof path, "/sys/block/sd%c/device/vpd_pg80", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    ssize_t n = read(fd, page, sizeof page - 1);
    close(fd);
    if (n < 4) continue;
    page[n] = 0;
    length += (size_t)snprintf(text + length, sizeof text - length, " %s", page + 4);
    if (length >= sizeof text) break;
  }
  say("DISKS %s:%s.", tag, text);
}

// Writes a word to the first sector of the SCSI disk with this serial number, or reads the one that is there if it begins with a `?`.
static void scsi_word(const char *serial, const char *word) {
  static char text[SECTOR] __attribute__((aligned(SECTOR)));
  for (char name = 'a'; name <= 'p'; name++) {
    char path[64], page[256];
    snprintf(path, sizeof path, "/sys/block/sd%c/device/vpd_pg80", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    ssize_t n = read(fd, page, sizeof page - 1);
    close(fd);
    if (n < 4) continue;
    page[n] = 0;
    if (strcmp(page + 4, serial) != 0) continue;
    snprintf(path, sizeof path, "/dev/sd%c", name);
    int writes = word[0] != '?';
    fd = open(path, (writes ? O_WRONLY | O_DSYNC : O_RDONLY) | O_DIRECT | O_CLOEXEC);
    memset(text, 0, SECTOR);
    if (writes) snprintf(text, SECTOR, "%s", word);
    n = fd < 0 ? -1 : writes ? pwrite(fd, text, SECTOR, 0) : pread(fd, text, SECTOR, 0);
    if (fd >= 0) close(fd);
    text[SECTOR - 1] = 0;
    if (n != SECTOR) say("WORD %s: %s", serial, strerror(errno));
    else say("WORD %s %s is <%s>", serial, word, text);
    return;
  }
  say("WORD %s: no such disk", serial);
}

static void typed(const char *line) {
  say("ECHO %s", line);
  tcdrain(STDOUT_FILENO);
  unsigned from, to;
  if (sscanf(line, "fill %u %u", &from, &to) == 2) fill(from, to);
  if (strcmp(line, "size") == 0) say_size();
  if (strcmp(line, "deaf") == 0) deaf = 1;
  if (strcmp(line, "hear") == 0) deaf = 0;
  if (strcmp(line, "scsi") == 0) {
    load_modules(SCSI_MODULES, sizeof SCSI_MODULES / sizeof *SCSI_MODULES);
    say("SCSI loaded");
  }
  char serial[32], word[32];
  if (sscanf(line, "disks %31s", word) == 1) say_disks(word);
  if (sscanf(line, "word %31s %31s", serial, word) == 2) scsi_word(serial, word);
  if (strcmp(line, "poweroff") == 0) power_off();
  if (strcmp(line, "reboot") == 0) reboot(RB_AUTOBOOT);
  if (strcmp(line, "panic") == 0) {
    int fd = open("/proc/sysrq-trigger", O_WRONLY);
    if (fd < 0 || write(fd, "c", 1) != 1) say("PANIC failed: %s", strerror(errno));
  }
}

// Puts typed bytes together to lines.
static void read_console(void) {
  static char line[1024];
  static size_t length;
  char bytes[256];
  ssize_t n = read(STDIN_FILENO, bytes, sizeof bytes);
  for (ssize_t i = 0; i < n; i++) {
    if (bytes[i] != '\n' && bytes[i] != '\r') {
      if (length < sizeof line - 1) line[length++] = bytes[i];
    } else if (length > 0) {
      line[length] = 0;
      length = 0;
      typed(line);
    }
  }
}

static int button_pressed(int fd) {
  struct input_event event;
  int pressed = 0;
  while (read(fd, &event, sizeof event) == sizeof event) {
    if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1) pressed = 1;
  }
  return pressed;
}

// The record as it is on the disk. False: it could not be read.
static int read_record(int disk, char *record) {
  if (pread(disk, sector, SECTOR, 0) != SECTOR) {
    say("DISKERROR read: %s", strerror(errno));
    return 0;
  }
  memcpy(record, sector, SECTOR);
  record[SECTOR - 1] = 0;
  return 1;
}

// One beat. False: it did not count.
static int count_up(int disk, uint64_t *n, char *mine) {
  char next[SECTOR] = {0};
  snprintf(next, SECTOR, "COUNT %llu boot %s", (unsigned long long)(*n + 1), boot_id);
  if (disk >= 0) {
    char found[SECTOR];
    if (!read_record(disk, found)) return 0;
    if (memcmp(found, mine, SECTOR) != 0) say("SPLITBRAIN %llu boot %s found %.100s", (unsigned long long)*n, boot_id, found);
    memcpy(sector, next, SECTOR);
    if (pwrite(disk, sector, SECTOR, 0) != SECTOR) {
      say("DISKERROR write: %s", strerror(errno));
      return 0;
    }
  }
  memcpy(mine, next, SECTOR);
  *n += 1;
  say("%s", next);
  return 1;
}

int main(void) {
  mount("devtmpfs", "/dev", "devtmpfs", 0, "");
  mount("proc", "/proc", "proc", 0, "");
  mount("sysfs", "/sys", "sysfs", 0, "");
  int console = open("/dev/console", O_RDWR | O_CLOEXEC);
  for (int fd = 0; fd < 3; fd++) dup2(console, fd);
  struct termios t;
  if (tcgetattr(STDIN_FILENO, &t) == 0) {
    t.c_lflag &= ~(ICANON | ECHO | ISIG);
    tcsetattr(STDIN_FILENO, TCSANOW, &t);
  }
  int id = open("/proc/sys/kernel/random/boot_id", O_RDONLY);
  if (id < 0 || read(id, boot_id, 36) != 36) strcpy(boot_id, "unknown");
  close(id);

  load_modules(MODULES, sizeof MODULES / sizeof *MODULES);
  network_up();
  int disk = open_disk();
  int button = open_power_button();
  if (button < 0) say("NOBUTTON");
  int agent = open_agent_port();
  char mine[SECTOR] = {0};
  unsigned long long found = 0;
  if (disk < 0)
    say("NODISK");
  else if (read_record(disk, mine))
    sscanf(mine, "COUNT %llu ", &found);
  uint64_t n = found;
  say("FIRMWARE %s", access("/sys/firmware/efi", F_OK) == 0 ? "uefi" : "bios");
  if (told("seed ")) read_seed();
  long beat_ms = told_number("beat=", 1000);
  start_load();
  say("READY %llu boot %s", found, boot_id);

  int64_t next = now_ms();
  int agent_rests = 0;
  for (;;) {
    int64_t left = next - now_ms();
    if (left <= 0) {
      count_up(disk, &n, mine);
      agent_rests = 0;
      next = now_ms() + beat_ms;
      continue;
    }
    if (load.memory) {
      write_load();
      if (left > LOAD_EVERY_MS) left = LOAD_EVERY_MS;
    }
    struct pollfd ready[] = {
        {.fd = STDIN_FILENO, .events = POLLIN}, {.fd = button, .events = POLLIN}, {.fd = agent_rests ? -1 : agent, .events = POLLIN}};
    if (poll(ready, 3, (int)left) > 0) {
      if (ready[2].revents & POLLIN) read_agent(agent);
      // Nobody is at the other end: looked at again after the next beat.
      else if (ready[2].revents) agent_rests = 1;
      if (ready[0].revents) read_console();
      if (ready[1].revents && button_pressed(button)) power_off();
    }
  }
}
