-- Images on which your own model and the ensemble differ, the ensemble's most certain first; distance between the two.
-- Parameters: {"count": 10}
WITH names AS (SELECT DISTINCT target, target_name FROM counterfactuals)
SELECT codes.image_id, codes.label_name, prediction_name, names.target_name AS ensemble_name,
       round(prob, 4) AS ensemble_prob,
       round(probs[prediction + 1], 4) AS prediction_prob,
       round(distance_z_l1, 2) AS distance
FROM codes JOIN ensemble USING (image_id) LEFT JOIN names ON names.target = class
     LEFT JOIN counterfactuals AS pairs
     ON pairs.image_id = codes.image_id AND pairs.target IN (prediction, class) AND converged
WHERE prediction <> class
ORDER BY prob DESC, codes.image_id
LIMIT $count
