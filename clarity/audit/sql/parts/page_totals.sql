-- Counts and medians over all rows of the audit.
SELECT * FROM (
    SELECT count(*) AS images, count(*) FILTER (status <> 'ok') AS failed,
           count(label) FILTER (status = 'ok') AS labelled,
           count(*) FILTER (status = 'ok' AND label = source) AS agree
    FROM codes
), (
    SELECT pairs, converged, nonfinite, reencoded_as_target, median_steps, median_distance, epistemic_initial,
           epistemic_final, judged, judged_as_target
    FROM class_pair_figures WHERE source IS NULL
), (
    SELECT median(reencoded_target_prob) AS reencoded, count(confirmed) AS checked,
           count(*) FILTER (confirmed) AS confirmed, count(*) FILTER (confirmed AND rungs > 0) AS went_on
    FROM counterfactuals
)
