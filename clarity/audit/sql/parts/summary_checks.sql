-- Pairs that were checked, those that passed, and their rungs.
SELECT count(*) FILTER (confirmed) AS confirmed, count(confirmed) AS pairs, coalesce(max(rungs), 0) AS most_rungs,
       round(coalesce(avg(rungs), 0), 3) AS mean_rungs
FROM counterfactuals
