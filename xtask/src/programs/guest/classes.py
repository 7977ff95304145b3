"""Many small objects: methods, properties, inheritance, generators, exceptions, a priority queue."""

import heapq


class Shape:
    count = 0

    def __init__(self, name):
        self.name = name
        Shape.count += 1

    def area(self):
        raise NotImplementedError

    def __lt__(self, other):
        return self.area() < other.area()


class Rectangle(Shape):
    def __init__(self, width, height):
        super().__init__("rectangle")
        self.width, self.height = width, height

    @property
    def ratio(self):
        return self.width / self.height

    def area(self):
        return self.width * self.height


class Square(Rectangle):
    def __init__(self, side):
        super().__init__(side, side)
        self.name = "square"


class Circle(Shape):
    __slots__ = ("radius",)

    def __init__(self, radius):
        super().__init__("circle")
        self.radius = radius

    def area(self):
        return 3 * self.radius * self.radius


def shapes(count):
    for n in range(count):
        kind = n * 7919 % 4
        if kind == 0:
            yield Square(n % 100 + 1)
        elif kind == 1:
            yield Circle(n % 50 + 1)
        elif kind == 2:
            yield Rectangle(n % 30 + 1, n % 70)
        else:
            yield Shape("abstract")


queue = []
failures = 0
ratios = 0.0
for shape in shapes(400000):
    try:
        area = shape.area()
        if isinstance(shape, Rectangle):
            ratios += shape.ratio
        heapq.heappush(queue, (area, shape.name, len(queue)))
        if len(queue) > 1000:
            heapq.heappop(queue)
    except (NotImplementedError, ZeroDivisionError) as error:
        failures += len(type(error).__name__)
print(Shape.count, failures, repr(ratios), sorted(queue)[:10], sorted(queue)[-10:])
print(sum(area for area, _, _ in queue))
