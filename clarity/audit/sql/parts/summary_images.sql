-- Images, those that were not read, and those of a label that the model does not know.
SELECT count(*) AS images, count(error) AS unread,
       count(*) FILTER (label IS NULL AND label_name IS NOT NULL) AS unknown_labels
FROM codes
