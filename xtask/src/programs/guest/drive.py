#!/usr/bin/python3
"""Runs the programs of `cargo xtask programs`, natively (in a chroot) or as the guest's only work, and prints, for each,
`START name` and then `PROGRAM name seconds checksum`: the SHA-256 of all that it made, or `-` where that is a speed.

Arguments: the seconds of each `openssl speed`, and the names to run; nothing runs them all."""

import hashlib
import os
import re
import subprocess
import sys
import time

BENCH = "/bench"
TMP = "/tmp/programs"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONHASHSEED": "0", "HOME": TMP}


class Failed(Exception):
    pass


def run(arguments, stdin=None):
    """Standard output and standard error of a program that must succeed."""
    source = open(stdin, "rb") if stdin else subprocess.DEVNULL
    ended = subprocess.run(
        arguments, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=TMP
    )
    if ended.returncode != 0:
        raise Failed("%s ended with %d: %r" % (arguments[0], ended.returncode, ended.stdout[-300:]))
    return ended.stdout


def content(path):
    with open(path, "rb") as file:
        return file.read()


def timed(arguments, made=None, stdin=None):
    """A program's time; the checksum is of the file it made, else of what it printed."""
    began = time.perf_counter()
    output = run(arguments, stdin)
    seconds = time.perf_counter() - began
    return seconds, hashlib.sha256(content(made) if made else output).hexdigest()


def gcc(level):
    def compile():
        made = TMP + "/big.o"
        return timed(["gcc", level, "-c", BENCH + "/big.c", "-o", made], made)

    return compile


def link_and_run():
    """What gcc made must also compute the same."""
    program = TMP + "/big"
    began = time.perf_counter()
    run(["gcc", "-O2", BENCH + "/small.c", "-o", program, "-lm"])
    output = run([program])
    return time.perf_counter() - began, hashlib.sha256(output).hexdigest()


def python(name):
    return lambda: timed(["python3", "%s/%s.py" % (BENCH, name)])


def sqlite(database):
    def query():
        if database != ":memory:" and os.path.exists(database):
            os.remove(database)
        return timed(["sqlite3", "-batch", database], stdin=BENCH + "/queries.sql")

    return query


def openssl_speed(arguments, field, work):
    """Seconds for `work` bytes or operations, from the speed that openssl finds."""

    def speed():
        output = run(["openssl", "speed", "-mr", "-seconds", SECONDS] + arguments).decode()
        line = [line for line in output.splitlines() if re.match(field + ":", line)]
        if not line:
            raise Failed("openssl speed printed %r" % output[-300:])
        return work / float(line[0].split(":")[3]), "-"

    return speed


def openssl_check():
    """Hashes, encrypts and signs files whose results are known natively."""
    big, key = BENCH + "/big.c", BENCH + "/key.pem"
    cipher = ["openssl", "enc", "-nosalt", "-K", "00112233445566778899aabbccddeeff" * 2, "-iv", "01" * 16]
    commands = [["openssl", "dgst", "-" + name, big] for name in ["sha1", "sha256", "sha512", "sha3-256", "blake2b512"]]
    commands += [cipher + ["-" + name, "-in", big] for name in ["aes-256-cbc", "aes-256-ctr", "chacha20"]]
    commands.append(["openssl", "dgst", "-sha256", "-sign", key, big])
    began = time.perf_counter()
    made = b"".join(run(command) for command in commands)
    return time.perf_counter() - began, hashlib.sha256(made).hexdigest()


def seven_zip_benchmark():
    """Seconds for 10,000 million of 7-Zip's instructions, from its rating of both directions."""
    output = run(["/usr/lib/p7zip/7za", "b", "1", "-mmt1", "-md18"]).decode()
    total = [line for line in output.splitlines() if line.startswith("Tot:")]
    if not total or "ERROR" in output:
        raise Failed("7z b printed %r" % output[-300:])
    return 10000 / float(total[0].split()[-1]), "-"


def seven_zip_compress():
    arguments = ["/usr/lib/p7zip/7za", "a", "-txz", "-mmt1", "-mx7", "-si", "-so", "-an"]
    return timed(arguments, stdin=BENCH + "/big.c")


PROGRAMS = [
    ("gcc -O1", gcc("-O1")),
    ("gcc -O0", gcc("-O0")),
    ("gcc, ld, run", link_and_run),
    ("python nbody", python("nbody")),
    ("python json", python("documents")),
    ("python regex", python("expressions")),
    ("python words", python("words")),
    ("python classes", python("classes")),
    ("sqlite memory", sqlite(":memory:")),
    ("sqlite file", sqlite(TMP + "/data.db")),
    ("openssl sha256", openssl_speed(["-bytes", "16384", "-evp", "sha256"], r"\+F", 2.0**30)),
    ("openssl aes-256-gcm", openssl_speed(["-bytes", "16384", "-evp", "aes-256-gcm"], r"\+F", 2.0**32)),
    ("openssl rsa2048", openssl_speed(["rsa2048"], r"\+F2", 1000)),
    ("openssl files", openssl_check),
    ("7z b", seven_zip_benchmark),
    ("7z a", seven_zip_compress),
]


def main():
    only = sys.argv[2:]
    os.makedirs(TMP, exist_ok=True)
    for name, program in PROGRAMS:
        if only and not any(wanted in name for wanted in only):
            continue
        print("START", name, flush=True)
        try:
            seconds, checksum = program()
        except (Failed, OSError) as error:
            print("FAILED", name.replace(" ", "_"), error, flush=True)
            return
        print("PROGRAM", name.replace(" ", "_"), "%.4f" % seconds, checksum, flush=True)
    print("PROGRAMS-DONE", flush=True)


SECONDS = sys.argv[1]
main()
