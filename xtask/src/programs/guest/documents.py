"""JSON documents made, written, read, changed and written again; also base64, zlib and hashes of them."""

import base64
import hashlib
import json
import zlib


def document(n):
    return {
        "id": n,
        "name": "document %d – ünïcode" % n,
        "tags": ["tag%d" % (n * k % 17) for k in range(6)],
        "matrix": [[(n + i * j) / 7 for i in range(5)] for j in range(5)],
        "nested": {"flag": n % 2 == 0, "nothing": None, "text": "line\n\t\"quoted\" \\ " * 3},
    }


digest = hashlib.sha256()
total = 0.0
for n in range(5000):
    text = json.dumps(document(n), sort_keys=True, indent=1 if n % 3 == 0 else None)
    read = json.loads(text)
    total += sum(map(sum, read["matrix"]))
    read["tags"].sort()
    packed = zlib.compress(json.dumps(read).encode(), 6)
    digest.update(base64.b64encode(packed))
    if zlib.decompress(packed) != json.dumps(read).encode():
        raise SystemExit("zlib changed a document")
print(repr(total), digest.hexdigest())
