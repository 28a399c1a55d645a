-- Figures of every class pair; medians are over the pairs that converged.
SELECT source, source_name, target, target_name, pairs,
       round(strict_validity, 4) AS strict_validity,
       round(reencoded_agreement, 4) AS reencoded_agreement,
       median_steps,
       round(median_distance, 2) AS median_distance,
       round(epistemic_initial, 4) AS epistemic_initial,
       round(epistemic_final, 4) AS epistemic_final
FROM class_pair_figures
WHERE source IS NOT NULL
ORDER BY source, target
