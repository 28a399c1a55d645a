-- Probability of the target once encoded again.
SELECT quantile_cont(reencoded_target_prob, 0.5) AS median, quantile_cont(reencoded_target_prob, 0.05) AS p5
FROM counterfactuals
