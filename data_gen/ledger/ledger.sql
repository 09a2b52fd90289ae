-- The tables of a ledger. Times are seconds since 1970; prices are US dollars.

-- What all runs share: their settings, the further names of categories as YAML, and the folder of the images relative to
-- the ledger's.
CREATE TABLE facts(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE runs(number INTEGER PRIMARY KEY, settings TEXT NOT NULL, started REAL NOT NULL, ended REAL, outcome TEXT);
CREATE TABLE items(id TEXT PRIMARY KEY, number INTEGER NOT NULL UNIQUE, content TEXT NOT NULL);

-- A form is what many requests share: model, system message, schema and parameters.
CREATE TABLE forms(id INTEGER PRIMARY KEY, content TEXT NOT NULL UNIQUE);
CREATE TABLE requests(
  key TEXT PRIMARY KEY, stage TEXT NOT NULL, item TEXT NOT NULL, model TEXT NOT NULL,
  form INTEGER NOT NULL REFERENCES forms(id), prompt TEXT NOT NULL, created REAL NOT NULL
) WITHOUT ROWID;

-- Each attempt that the server answered; `verdict` is the list of faults that the rules found, NULL before.
CREATE TABLE answers(
  key TEXT NOT NULL REFERENCES requests(key), attempt INTEGER NOT NULL, status TEXT NOT NULL, text TEXT NOT NULL,
  why TEXT NOT NULL, usage_in INTEGER NOT NULL, usage_cached INTEGER NOT NULL, usage_out INTEGER NOT NULL,
  price REAL NOT NULL, sends INTEGER NOT NULL, verdict TEXT, created REAL NOT NULL, PRIMARY KEY(key, attempt)
) WITHOUT ROWID;
CREATE TABLE batches(
  token TEXT PRIMARY KEY, id TEXT, status TEXT NOT NULL, requests INTEGER NOT NULL, created REAL NOT NULL
) WITHOUT ROWID;

-- An item with an outcome in a style is finished; a pair's state is new, kept or duplicate.
CREATE TABLE outcomes(
  item TEXT NOT NULL REFERENCES items(id), style TEXT NOT NULL, PRIMARY KEY(item, style)
) WITHOUT ROWID;
CREATE TABLE pairs(id TEXT PRIMARY KEY, content TEXT NOT NULL, state TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE drops(
  item TEXT NOT NULL, stage TEXT NOT NULL, rule TEXT NOT NULL, reason TEXT NOT NULL, pair TEXT NOT NULL,
  PRIMARY KEY(item, stage, pair, rule, reason)
) WITHOUT ROWID;

-- Decisions of reviewers; an undone one is kept, with its time.
CREATE TABLE decisions(
  number INTEGER PRIMARY KEY AUTOINCREMENT, pair TEXT NOT NULL, reviewer TEXT NOT NULL, verdict TEXT NOT NULL,
  reason TEXT NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL, created REAL NOT NULL, undone REAL
);
CREATE INDEX decisions_by_pair ON decisions(pair, reviewer);
