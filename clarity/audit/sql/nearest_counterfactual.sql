-- The nearest counterfactual of each image: its class and distance.
-- Parameters: {"count": 10}
SELECT image_id, source_name, target_name, steps, round(distance_z_l1, 2) AS distance
FROM counterfactuals
WHERE converged
QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY distance_z_l1, target) = 1
ORDER BY distance_z_l1, image_id
LIMIT $count
