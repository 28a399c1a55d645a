-- What could not be explained, by reason.
SELECT 'image' AS kind, coalesce(error, status) AS reason, count(*) AS rows
FROM codes WHERE status <> 'ok' GROUP BY ALL
UNION ALL
SELECT 'pair', CASE WHEN status <> 'ok' THEN status ELSE 'not converged' END, count(*)
FROM counterfactuals WHERE status <> 'ok' OR NOT converged GROUP BY ALL
ORDER BY kind, rows DESC, reason
