-- Images on which your own model and the ensemble differ, the ensemble's most certain first, and the distance to your
-- model's class.
-- Parameters: {"count": 10}
SELECT codes.image_id, label_name, prediction_name, codes.source_name,
       round(probs[codes.source + 1], 4) AS source_prob,
       round(probs[prediction + 1], 4) AS prediction_prob,
       round(distance_z_l1, 2) AS distance
FROM codes LEFT JOIN counterfactuals
     ON counterfactuals.image_id = codes.image_id AND target = prediction AND converged
WHERE codes.status = 'ok' AND prediction <> codes.source
ORDER BY probs[codes.source + 1] DESC, codes.image_id
LIMIT $count
