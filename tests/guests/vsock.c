/* Sockets to the host, for tests/vsock.rs.
 *
 * vsock echo PORT    takes one connection, says back what it hears, and ends when it has
 * vsock call PORT    connects to the host, sends stdin, shuts that half, and prints what comes
 * vsock hold PORT    connects, says so, and prints the error that ends the connection
 */
#include <errno.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void check(int good, const char *what) {
    if (!good) {
        printf("%s: %s\n", what, strerror(errno));
        exit(1);
    }
}

static void write_all(int fd, const char *data, ssize_t length) {
    while (length > 0) {
        ssize_t done = write(fd, data, length);
        check(done > 0, "write");
        data += done;
        length -= done;
    }
}

static void copy(int from, int to) {
    static char data[1 << 16];
    ssize_t length;
    while ((length = read(from, data, sizeof data)) > 0)
        write_all(to, data, length);
    check(length == 0, "read");
}

int main(int argc, char **argv) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = atoi(argv[2])};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    check(fd >= 0, "socket");
    if (!strcmp(argv[1], "echo")) {
        address.svm_cid = VMADDR_CID_ANY;
        check(!bind(fd, (struct sockaddr *)&address, sizeof address), "bind");
        check(!listen(fd, 1), "listen");
        puts("listening");
        fflush(stdout);
        fd = accept(fd, NULL, NULL);
        check(fd >= 0, "accept");
        copy(fd, fd);
        return 0;
    }
    check(!connect(fd, (struct sockaddr *)&address, sizeof address), "connect");
    if (!strcmp(argv[1], "call")) {
        copy(0, fd);
        check(!shutdown(fd, SHUT_WR), "shutdown");
        copy(fd, 1);
        return 0;
    }
    puts("holding");
    fflush(stdout);
    char byte;
    check(read(fd, &byte, 1) > 0, "read");
    return 0;
}
