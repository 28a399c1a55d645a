-- The most frequent reasons why images were not read.
SELECT error, count(*) AS images FROM codes
WHERE error IS NOT NULL GROUP BY error ORDER BY images DESC, error LIMIT 20
