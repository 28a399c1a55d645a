-- A sample of converged pairs with their codes and pictures: as many of each target, evenly over sources.
WITH turns AS (
    SELECT image_id, source, target, md5(image_id) AS lot,
           row_number() OVER (PARTITION BY source, target ORDER BY md5(image_id), image_id) AS turn
    FROM counterfactuals WHERE converged
), chosen AS (
    SELECT image_id, target FROM turns WHERE turn <= $each
    QUALIFY row_number() OVER (PARTITION BY target ORDER BY turn, lot, image_id) <= $each
)
SELECT image_id, p.source, target, c.z, p.z_cf, c.x, p.x_cf
FROM counterfactuals AS p SEMI JOIN chosen USING (image_id, target) JOIN codes AS c USING (image_id)
ORDER BY source, target, image_id
