"""Regular expressions over a log that is made up."""

import re

lines = []
seed = 12345
for n in range(40000):
    seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
    address = ".".join(str(seed >> shift & 255) for shift in (0, 5, 11, 17))
    path = "/%s/%d/item-%x.html" % (["shop", "blog", "api/v2"][seed % 3], n, seed)
    lines.append('%s - user%d [%02d/Nov/2026:%02d:%02d] "GET %s HTTP/1.1" %d %d' % (
        address, seed % 100, n % 28 + 1, n % 24, n % 60, path, [200, 301, 404, 500][seed >> 7 & 3], seed % 90000))
log = "\n".join(lines)

entry = re.compile(r'^(\S+) - (?P<user>\w+) \[([^\]]+)\] "(GET|POST) (/[^ ]*) HTTP/[\d.]+" (\d{3}) (\d+)$', re.M)
found = {}
size = 0
for match in entry.finditer(log):
    size += int(match.group(7))
    found[match["user"]] = found.get(match["user"], 0) + 1
print(len(found), size)
print(len(re.findall(r"(?:api|blog)/(?:\w+/)*item-[0-9a-f]*(?:ff|00)[0-9a-f]*", log)))
print(len(re.sub(r"(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})", r"\4.\3.\2.\1", log)))
print(sum(len(part) for part in re.split(r"[\s\"/]+", log)))
print(len(re.findall(r"(\w)(\w)\2\1", log)), len(re.findall(r"(?i)USER(?=[0-9]*7\b)", log)))
