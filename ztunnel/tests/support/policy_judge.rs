//! Evaluates policies for the tests of the control plane: what it translates is judged by what enforces it.
//!
//! A request is a line of JSON on stdin: `policies` (pairs of a name and the message in hex), `namespace` of the
//! workload, `named` policies of it, and `connections` (triples of a SPIFFE id or nothing, source and destination as
//! `ip:port`). Its answer is a line on stdout: a digit for each connection, 1 if it is allowed, or "error: ...".

use std::io::{self, BufRead, Write};

use prost::Message;
use serde_json::Value;
use ztunnel::{
    policy::{Connection, PolicySet, Verdict},
    proto::security::Authorization,
};

fn list<'a>(value: &'a Value, what: &str) -> Result<&'a Vec<Value>, String> {
    value.as_array().ok_or_else(|| format!("{what} is no list"))
}

fn text(value: &Value) -> Result<&str, String> {
    value.as_str().ok_or_else(|| format!("{value} is no text"))
}

fn bytes(hex: &str) -> Result<Vec<u8>, String> {
    let digits: Vec<char> = hex.chars().collect();
    let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16);
    digits.chunks(2).map(|pair| byte(pair).map_err(|error| error.to_string())).collect()
}

fn connection(asked: &Value) -> Result<Connection, String> {
    let address = |value: &Value| text(value)?.parse().map_err(|error| format!("{value}: {error}"));
    let identity = match text(&asked[0])? {
        "" => None,
        uri => Some(uri.parse().map_err(|error| format!("{error}"))?),
    };
    let (source, destination) = (address(&asked[1])?, address(&asked[2])?);
    Ok(Connection { source_identity: identity, source, destination, in_transition: false })
}

fn answer(line: &str) -> Result<String, String> {
    let request: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let mut set = PolicySet::default();
    for policy in list(&request["policies"], "policies")? {
        let message = bytes(text(&policy[1])?)?;
        let proto = Authorization::decode(&message[..]).map_err(|error| error.to_string())?;
        set.upsert(text(&policy[0])?, &proto).map_err(|error| error.to_string())?;
    }
    let named = list(&request["named"], "named")?.iter().map(|name| text(name).map(str::to_owned));
    let named: Vec<String> = named.collect::<Result<_, _>>()?;
    let namespace = text(&request["namespace"])?;
    let allowed = |asked| Ok(set.evaluate(namespace, &named, &connection(asked)?) == Verdict::Allow);
    let digit = |allowed| if allowed { '1' } else { '0' };
    list(&request["connections"], "connections")?.iter().map(|asked| allowed(asked).map(digit)).collect()
}

fn main() -> io::Result<()> {
    for line in io::stdin().lock().lines() {
        let text = answer(&line?).unwrap_or_else(|error| format!("error: {error}"));
        writeln!(io::stdout().lock(), "{text}")?;
    }
    Ok(())
}
