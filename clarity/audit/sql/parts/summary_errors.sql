-- The most frequent reasons why images were not read, each with the first such image.
SELECT error, count(*) AS images, min(image_id) AS first FROM codes
WHERE error IS NOT NULL GROUP BY error ORDER BY images DESC, error LIMIT 20
