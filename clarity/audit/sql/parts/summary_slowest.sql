-- The class pairs with the most steps.
SELECT source_name AS source, target_name AS target, pairs, round(mean_steps, 1) AS mean_steps
FROM class_pair_figures WHERE source IS NOT NULL
ORDER BY class_pair_figures.mean_steps DESC, class_pair_figures.source, class_pair_figures.target LIMIT 5
