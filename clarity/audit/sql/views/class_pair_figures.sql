-- Figures of every class pair; the row without classes is over all pairs.
-- Distances and median steps are of the pairs that converged, mean steps of all.
CREATE VIEW class_pair_figures AS
SELECT source, source_name, target, target_name,
       count(*) AS pairs,
       count(*) FILTER (converged) AS converged,
       count(*) FILTER (status <> 'ok') AS nonfinite,
       count(*) FILTER (reencoded_class = target) AS reencoded_as_target,
       count(judge_class) AS judged,
       count(*) FILTER (judge_class = target) AS judged_as_target,
       count(*) FILTER (converged) / count(*) AS strict_validity,
       count(*) FILTER (reencoded_class = target) / count(*) AS reencoded_agreement,
       count(*) FILTER (judge_class = target) / nullif(count(judge_class), 0) AS judge_agreement,
       count(*) FILTER (confirmed) / nullif(count(confirmed), 0) AS confirmed_share,
       median(steps) FILTER (converged) AS median_steps,
       avg(steps) AS mean_steps,
       median(distance_z_l1) FILTER (converged) AS median_distance,
       median(epistemic_initial) AS epistemic_initial,
       median(epistemic_final) AS epistemic_final
FROM counterfactuals
GROUP BY GROUPING SETS ((source, source_name, target, target_name), ());
