//! The data plane of undermesh. It serves the pods that the agent of its node hands over: outbound connections go
//! into mTLS tunnels, inbound ones are authenticated, authorised and delivered to the app.

#![deny(unsafe_code)]

pub mod identity;
pub mod marks;
pub mod policy;
pub mod proto;
