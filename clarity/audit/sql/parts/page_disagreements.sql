-- Images whose prediction is not the class that the ensemble sees, in order of its certainty.
SELECT c.image_id, c.label_name, prediction, e.class AS seen, {theirs} AS their_prob, prob AS seen_prob,
       probs[prediction + 1] AS prediction_prob, distance_z_l1 AS distance,
       CASE WHEN c.source = prediction THEN e.class ELSE prediction END AS other
FROM codes AS c JOIN ensemble AS e USING (image_id) LEFT JOIN counterfactuals AS p
     ON p.image_id = c.image_id AND target IN (prediction, e.class) AND converged
WHERE prediction <> e.class
ORDER BY prob DESC, c.image_id LIMIT $count
