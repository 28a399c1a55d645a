-- Images of each class in turn, chosen by a hash of their ids.
WITH turns AS (
    SELECT image_id, source, row_number() OVER (PARTITION BY source ORDER BY md5(image_id), image_id) AS turn
    FROM codes WHERE status = 'ok'
)
SELECT image_id FROM turns WHERE turn <= $each ORDER BY turn, source, image_id
