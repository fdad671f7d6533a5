package etcd

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/entry"
)

// keyspace makes the keys of one namespace. A channel's name has no slash in a key, so that no
// channel's log is in the range of another's, whatever the names.
type keyspace struct {
	id    string
	heads string
	logs  string
	locks string
}

func newKeyspace(namespace string) keyspace {
	return keyspace{
		id: namespace + "/id", heads: namespace + "/head/",
		logs: namespace + "/log/", locks: namespace + "/lock/",
	}
}

// reserved tells whether part may not be a path element of a namespace: one namespace within
// another would otherwise share keys with it.
func reserved(part string) bool {
	return part == "id" || part == "head" || part == "log" || part == "lock"
}

var escaper = strings.NewReplacer("%", "%25", "/", "%2F")

// escape makes a channel's name one path element. It is the form in which this package's maps
// hold names, because that is how they come in watch events.
func escape(channel string) string { return escaper.Replace(channel) }

func (k keyspace) head(name string) string { return k.heads + name }

// log is the prefix of a channel's entries.
func (k keyspace) log(name string) string { return k.logs + name + "/" }

// entry is the key of the entry that ends at p; keys sort as positions do.
func (k keyspace) entry(name string, p dchannel.Position) string {
	return fmt.Sprintf("%s%016x-%016x", k.log(name), p.Epoch, p.Seq)
}

// epochEnd is the end of the range of an epoch's entries: "." follows "-".
func (k keyspace) epochEnd(name string, epoch uint64) string {
	return fmt.Sprintf("%s%016x.", k.log(name), epoch)
}

// lock is the prefix of what there is of a channel's lock.
func (k keyspace) lock(name string) string { return k.locks + name + "/" }

// hold is there, under a lease of its own, while the lock is held.
func (k keyspace) hold(name string) string { return k.lock(name) + "hold" }

// record tells of the newest generation, and how the last ones ended.
func (k keyspace) record(name string) string { return k.lock(name) + "record" }

// line is the prefix of the places of those who wait for the lock, in the order of their making.
func (k keyspace) line(name string) string { return k.lock(name) + "line/" }

func (k keyspace) place(name, token string) string { return k.line(name) + token }

// channelOf returns the escaped channel name in an entry's key, nil if it is none.
func (k keyspace) channelOf(key []byte) []byte {
	rest, ok := bytes.CutPrefix(key, []byte(k.logs))
	if !ok {
		return nil
	}
	name, _, ok := bytes.Cut(rest, []byte{'/'})
	if !ok {
		return nil
	}
	return name
}

// tail is what a head key holds: the last entry of a log, without its data. As the entry's ID is
// random, equal values mean the same log in the same state; a revision would not,
// since revisions come again after a loss of the data directory.
type tail struct {
	dchannel.Position
	id     dchannel.ID
	closed bool
}

const tailVersion = "D1"

func (t tail) String() string {
	kind := byte('m')
	if t.closed {
		kind = 'c'
	}
	return fmt.Sprintf("%s %d %d %s %c", tailVersion, t.Epoch, t.Seq, t.id, kind)
}

func tailOf(e dchannel.Entry) tail { return tail{Position: e.Position, id: e.ID, closed: e.Closed} }

var errForeignHead = errors.New("head key holds something else")

func parseTail(v []byte) (t tail, err error) {
	f := bytes.Split(v, []byte{' '})
	if len(f) != 5 || string(f[0]) != tailVersion || len(f[4]) != 1 {
		return t, errForeignHead
	}
	epoch, err1 := strconv.ParseUint(string(f[1]), 10, 64)
	seq, err2 := strconv.ParseUint(string(f[2]), 10, 64)
	if err1 != nil || err2 != nil || epoch == 0 || seq == 0 || !entry.ParseID(&t.id, f[3]) {
		return t, errForeignHead
	}
	t.Epoch, t.Seq, t.closed = epoch, seq, f[4][0] == 'c'
	return t, nil
}
