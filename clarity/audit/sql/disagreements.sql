-- Images that are not classified as their label, by the ensemble's probability of it.
-- Parameters: {"count": 10}
SELECT image_id, label_name, source_name,
       round(probs[label + 1], 4) AS ensemble_label_prob,
       round(epistemic, 3) AS epistemic
FROM codes
WHERE status = 'ok' AND label <> source
ORDER BY probs[label + 1], image_id
LIMIT $count
