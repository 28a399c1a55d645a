-- Counts and steps over all pairs.
SELECT pairs, converged, nonfinite, reencoded_as_target, judged, judged_as_target, round(mean_steps, 2) AS mean_steps,
       (SELECT quantile_disc(steps, 0.5) FROM counterfactuals) AS median_steps,
       (SELECT quantile_cont(target_prob_final, 0.05) FROM counterfactuals) AS target_prob_p5
FROM class_pair_figures WHERE source IS NULL
