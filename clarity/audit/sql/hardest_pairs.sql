-- The class pairs that take the largest change: those that mostly fail first, then by median latent distance.
-- Parameters: {"count": 10}
SELECT source_name, target_name, pairs,
       round(strict_validity, 4) AS strict_validity,
       median_steps,
       round(median_distance, 2) AS median_distance
FROM class_pair_figures
WHERE source IS NOT NULL
ORDER BY strict_validity < 0.5 DESC, median_distance DESC NULLS FIRST, source_name, target_name
LIMIT $count
