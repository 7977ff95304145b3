"""Bodies that attract each other: floating-point arithmetic on lists."""


def bodies(count):
    made = []
    for n in range(count):
        x, y, z = (n * 37 % 11) - 5.0, (n * 53 % 13) - 6.0, (n * 71 % 7) - 3.0
        made.append([x, y, z, y * 0.01, -x * 0.01, z * 0.001, 1.0 + n % 3])
    return made


def step(system, dt):
    count = len(system)
    for i in range(count):
        a = system[i]
        for j in range(i + 1, count):
            b = system[j]
            dx, dy, dz = a[0] - b[0], a[1] - b[1], a[2] - b[2]
            distance = dx * dx + dy * dy + dz * dz + 0.01
            pull = dt / (distance * distance**0.5)
            a[3] -= dx * b[6] * pull
            a[4] -= dy * b[6] * pull
            a[5] -= dz * b[6] * pull
            b[3] += dx * a[6] * pull
            b[4] += dy * a[6] * pull
            b[5] += dz * a[6] * pull
    for body in system:
        body[0] += dt * body[3]
        body[1] += dt * body[4]
        body[2] += dt * body[5]


system = bodies(8)
for _ in range(48000):
    step(system, 0.001)
for body in system:
    print(" ".join(repr(value) for value in body))
