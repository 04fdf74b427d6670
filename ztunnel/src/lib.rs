//! The data plane of undermesh. It serves the pods that the agent of its node hands over: outbound connections go
//! into mTLS tunnels, inbound ones are authenticated, authorised and delivered to the app.
//!
//! A connection's way: [`serve`] accepts it, [`decide`] says where it goes, [`hbone`] or a plain socket takes it
//! there, [`connections`] watches over it and [`copy`] moves its bytes. The far side's [`hbone`] server authorises it
//! and [`deliver`] connects to the app. [`drain`] is how all of it ends. [`node`] feeds [`state`], [`tls`] and [`pods`] with what the agent sends.

#![deny(unsafe_code)]

pub mod access_log;
pub mod app;
pub mod attested;
pub mod balance;
pub mod cli;
pub mod connections;
pub mod copy;
pub mod decide;
pub mod deliver;
pub mod drain;
pub mod failure;
pub mod hbone;
pub mod http;
pub mod identity;
pub mod inbound;
pub mod marks;
pub mod metrics;
pub mod node;
pub mod outbound;
pub mod pods;
pub mod policy;
pub mod proto;
pub mod run;
pub mod serve;
pub mod sockets;
pub mod state;
pub mod supervise;
pub mod tls;
