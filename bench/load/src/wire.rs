//! What client and server say to each other: a first byte that chooses, and for transfers the length of what the
//! server shall send.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
};

/// Everything after it comes back.
pub const ECHO: u8 = b'e';
/// A transfer: eight bytes of length follow. The server answers [`READY`], sends so much, takes all until the client
/// ends, and then says how much it took.
pub const TRANSFER: u8 = b't';
pub const READY: u8 = b'k';
/// Of one call of read or write.
pub const BLOCK: usize = 256 * 1024;

/// A connection that echoes.
pub fn echo(address: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = connect(address)?;
    // With a first byte to echo: the whole way is there when it is back.
    stream.write_all(&[ECHO, 0])?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}

/// A connection of which the server is to send `length` bytes, and knows it.
pub fn transfer(address: SocketAddr, length: u64) -> io::Result<TcpStream> {
    let mut stream = connect(address)?;
    let mut request = vec![TRANSFER];
    request.extend(length.to_be_bytes());
    stream.write_all(&request)?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends so much of nothing.
pub fn send(mut stream: &TcpStream, length: u64) -> io::Result<()> {
    let block = vec![0; BLOCK];
    let mut left = length;
    while left > 0 {
        let now = left.min(BLOCK as u64) as usize;
        stream.write_all(&block[..now])?;
        left -= now as u64;
    }
    Ok(())
}

pub fn broken(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
