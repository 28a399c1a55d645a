-- Class pairs of which one direction takes a larger change than the other.
-- Parameters: {"count": 10}
SELECT hard.source_name, hard.target_name,
       round(hard.median_distance, 2) AS distance,
       round(easy.median_distance, 2) AS distance_back,
       round(hard.median_distance / easy.median_distance, 2) AS ratio
FROM class_pair_figures AS hard JOIN class_pair_figures AS easy
     ON hard.source = easy.target AND hard.target = easy.source
WHERE hard.median_distance > easy.median_distance
ORDER BY hard.median_distance / easy.median_distance DESC, hard.source, hard.target
LIMIT $count
