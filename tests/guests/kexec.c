// kexec KERNEL INITRD COMMAND-LINE: loads another kernel by kexec_file_load(2) and starts it.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int count, char **words) {
  if (count != 4) return 2;
  int kernel = open(words[1], O_RDONLY), initrd = open(words[2], O_RDONLY);
  if (kernel < 0 || initrd < 0) {
    perror("open");
    return 1;
  }
  if (syscall(SYS_kexec_file_load, kernel, initrd, strlen(words[3]) + 1, words[3], 0) != 0) {
    perror("kexec_file_load");
    return 1;
  }
  reboot(LINUX_REBOOT_CMD_KEXEC);
  perror("reboot");
  return 1;
}
