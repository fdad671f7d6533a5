package redis

import (
	"strconv"
	"strings"
)

// keys makes the names of one partition. All of them begin with the same hash tag,
// so all are in one slot, and a script may touch any of them.
//
//	{dchannel/0}:m:<channel>  the head: the header line of the log's last entry
//	{dchannel/0}:s:<channel>  the stream; the id of an entry is epoch-seq, its fields are
//	                          h, the header line, and d, the data
//	{dchannel/0}:c:<channel>  the publish/subscribe channel: header line and data in
//	                          one message, or, with more than 4,096 bytes of data,
//	                          "S<size> " and header line, and then the data
//	{dchannel/0}:i            the incarnation: run_id and ID
//	{dchannel/0}:p:<random>   publish/subscribe only: one process's probes
//	{dchannel/0}:l:<channel>  the lock: a hash, see lock.lua
//	{dchannel/0}:w:<channel>  who waits for it in line: a sorted set of tokens
//	{dchannel/0}:t:<channel>  until when these tokens are known: another one
//	{dchannel/0}:n:<channel>  publish/subscribe only: the lock has changed
//
// Redis hashes what is between the first { and the next }. The tag comes first and
// a namespace has no braces, so a channel's name is used as it is, whatever it holds:
// names stay distinct, and readable with redis-cli.
//
// A tag per partition rather than per channel, because the incarnation has to be in
// the slot of the channels that it speaks for: one partition on a single server (it
// has one memory), a fixed number of them in a cluster.
type keys struct{ tag string }

func partition(namespace string, n int) keys {
	return keys{tag: "{" + namespace + "/" + strconv.Itoa(n) + "}:"}
}

func (k keys) head(channel string) string    { return k.tag + "m:" + channel }
func (k keys) stream(channel string) string  { return k.tag + "s:" + channel }
func (k keys) push(channel string) string    { return k.tag + "c:" + channel }
func (k keys) incarnation() string           { return k.tag + "i" }
func (k keys) probe(id string) string        { return k.tag + "p:" + id }
func (k keys) notices(channel string) string { return k.tag + "n:" + channel }

func (k keys) isNotice(key string) bool { return strings.HasPrefix(key, k.notices("")) }

// lock returns the keys that the lock is kept in.
func (k keys) lock(channel string) []string {
	return []string{k.tag + "l:" + channel, k.tag + "w:" + channel, k.tag + "t:" + channel}
}
