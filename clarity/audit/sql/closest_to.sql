-- The images that the model sees as one class and that are closest to another.
-- Parameters: {"source": "4", "target": "9", "count": 10}
SELECT image_id, steps, round(distance_z_l1, 2) AS distance,
       round(target_prob_initial, 4) AS target_prob_initial,
       round(target_prob_final, 4) AS target_prob_final
FROM counterfactuals
WHERE source_name = $source AND target_name = $target AND converged
ORDER BY distance_z_l1, image_id
LIMIT $count
