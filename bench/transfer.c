// Moves bytes over TCP, for `cargo xtask network`: transfer send|receive ADDRESS PORT BYTES
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char buffer[1 << 18];

static void fail(const char *what) {
    perror(what);
    exit(1);
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "transfer send|receive ADDRESS PORT BYTES\n");
        return 1;
    }
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[3]))};
    if (inet_pton(AF_INET, argv[2], &to.sin_addr) != 1) fail("address");
    int s = socket(AF_INET, SOCK_STREAM, 0);
    if (s < 0 || connect(s, (struct sockaddr *)&to, sizeof to) < 0) fail("connect");
    long long left = atoll(argv[4]);
    if (!strcmp(argv[1], "send")) {
        memset(buffer, 'x', sizeof buffer);
        while (left > 0) {
            ssize_t n = write(s, buffer, left < (long long)sizeof buffer ? left : (long long)sizeof buffer);
            if (n <= 0) fail("write");
            left -= n;
        }
        // Until the other side has it all and says so.
        shutdown(s, SHUT_WR);
        if (read(s, buffer, 1) != 1) fail("answer");
    } else {
        while (left > 0) {
            ssize_t n = read(s, buffer, sizeof buffer);
            if (n <= 0) fail("read");
            left -= n;
        }
        if (write(s, "x", 1) != 1) fail("answer");
    }
    return 0;
}
