-- Rows made by recursion, indexes, joins, aggregates, updates, text search. Everything is determined.
CREATE TABLE customer(id INTEGER PRIMARY KEY, name TEXT, city TEXT, balance REAL);
CREATE TABLE orders(id INTEGER PRIMARY KEY, customer INTEGER REFERENCES customer(id), day INTEGER, amount REAL, note TEXT);
BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)
INSERT INTO customer SELECT i, 'name' || (i * 7919 % 20011), 'city' || (i % 97), (i * 31 % 1000) / 8.0 FROM n;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 150000)
INSERT INTO orders SELECT i, i * 6361 % 20000 + 1, i * 13 % 365, (i * 17 % 5000) / 16.0, printf('note %08x for %d', i * 40503, i % 77) FROM n;
COMMIT;
CREATE INDEX by_name ON customer(name);
CREATE INDEX by_customer ON orders(customer, day);
CREATE INDEX by_day ON orders(day);
ANALYZE;
SELECT city, count(*), sum(amount), avg(balance) FROM customer JOIN orders ON orders.customer = customer.id GROUP BY city ORDER BY 3 DESC LIMIT 10;
SELECT day, count(DISTINCT customer), max(amount) FROM orders GROUP BY day ORDER BY day LIMIT 20;
SELECT c.name, o.amount FROM customer c JOIN orders o ON o.customer = c.id WHERE c.name LIKE 'name19%' AND o.day BETWEEN 100 AND 120 ORDER BY o.amount, c.name, o.id LIMIT 15;
SELECT count(*) FROM orders WHERE note LIKE '%7f%' OR note GLOB '*for 4?';
SELECT id, amount, sum(amount) OVER (PARTITION BY customer ORDER BY day, id) FROM orders WHERE customer < 200 ORDER BY 3 DESC, id LIMIT 10;
BEGIN;
UPDATE customer SET balance = balance + (SELECT coalesce(sum(amount), 0) FROM orders WHERE orders.customer = customer.id);
DELETE FROM orders WHERE day % 7 = 3;
COMMIT;
SELECT count(*), sum(balance), min(name), max(name) FROM customer;
SELECT group_concat(x, ',') FROM (SELECT substr(note, 6, 4) || length(note) AS x FROM orders ORDER BY note DESC LIMIT 50);
WITH RECURSIVE path(i, depth) AS (SELECT 1, 0 UNION SELECT customer, depth + 1 FROM orders JOIN path ON orders.id = path.i WHERE depth < 400) SELECT count(*), max(depth), sum(i) FROM path;
PRAGMA integrity_check;
