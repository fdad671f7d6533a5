package faultproxy_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/testserver"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	soon  = 10 * time.Second      // a bound for what must happen
	quiet = 50 * time.Millisecond // how long nothing must happen
)

// echo is a server that answers each line with "re " and the line.
type echo struct {
	net.Listener
	lines atomic.Int64 // how many it has taken
}

func startEcho(t *testing.T) *echo {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	e := &echo{Listener: l}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { e.serve(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return e
}

func (e *echo) serve(conn net.Conn) {
	defer conn.Close()
	in := bufio.NewScanner(conn)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		e.lines.Add(1)
		if _, err := fmt.Fprintf(conn, "re %s\n", in.Text()); err != nil {
			return
		}
	}
}

func newProxy(t *testing.T, target string) *faultproxy.Proxy {
	p, err := faultproxy.New(target)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, p.Close()) })
	return p
}

// client is a connection through the proxy, read by lines.
type client struct {
	*net.TCPConn
	r *bufio.Reader
}

func connect(t *testing.T, p *faultproxy.Proxy) *client {
	conn, err := net.Dial("tcp", p.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return &client{TCPConn: conn.(*net.TCPConn), r: bufio.NewReader(conn)}
}

func (c *client) say(t *testing.T, line string) {
	_, err := io.WriteString(c, line+"\n")
	require.NoError(t, err)
}

func (c *client) hear(limit time.Duration) (string, error) {
	if err := c.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return "", err
	}
	line, err := c.r.ReadString('\n')
	return strings.TrimSuffix(line, "\n"), err
}

func (c *client) ask(t *testing.T, line string) {
	c.say(t, line)
	got, err := c.hear(soon)
	require.NoError(t, err)
	require.Equal(t, "re "+line, got)
}

func (c *client) requireReset(t *testing.T) {
	_, err := c.hear(soon)
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

func (c *client) requireSilence(t *testing.T) {
	_, err := c.hear(quiet)
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	require.True(t, timeout.Timeout(), "%v", err)
}

func TestForwardsManyConnections(t *testing.T) {
	p := newProxy(t, startEcho(t).Addr().String())
	var wg sync.WaitGroup
	for i := range 20 {
		c := connect(t, p)
		wg.Go(func() {
			for j := range 50 {
				line := fmt.Sprintf("%d %d %s", i, j, strings.Repeat("x", j*500))
				_, err := io.WriteString(c, line+"\n")
				assert.NoError(t, err)
				got, err := c.hear(soon)
				assert.NoError(t, err)
				assert.Equal(t, "re "+line, got)
			}
		})
	}
	wg.Wait()
	assert.Equal(t, 20, p.Accepted())
	assert.Equal(t, 20, p.Connections())
	assert.Zero(t, p.Cuts())
}

func TestHalfCloseStillDeliversTheAnswer(t *testing.T) {
	p := newProxy(t, startEcho(t).Addr().String())
	c := connect(t, p)
	c.say(t, "last")
	require.NoError(t, c.CloseWrite())
	got, err := c.hear(soon)
	require.NoError(t, err)
	require.Equal(t, "re last", got)
	_, err = c.hear(soon)
	require.ErrorIs(t, err, io.EOF)
	require.Eventually(t, func() bool { return p.Connections() == 0 }, soon, time.Millisecond)
}

func TestCutResetsAllAndTakesNewOnes(t *testing.T) {
	p := newProxy(t, startEcho(t).Addr().String())
	a, b := connect(t, p), connect(t, p)
	a.ask(t, "1")
	b.ask(t, "1")
	assert.Equal(t, 2, p.Cut())
	a.requireReset(t)
	b.requireReset(t)
	assert.Equal(t, 2, p.Cuts())
	require.Eventually(t, func() bool { return p.Connections() == 0 }, soon, time.Millisecond)
	connect(t, p).ask(t, "2")
}

func TestRefuse(t *testing.T) {
	p := newProxy(t, startEcho(t).Addr().String())
	old := connect(t, p)
	old.ask(t, "1")
	for range 3 {
		require.NoError(t, p.Refuse(true))
		require.NoError(t, p.Refuse(true))
		_, err := net.Dial("tcp", p.Addr())
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		old.ask(t, "2")
		require.NoError(t, p.Refuse(false))
		require.NoError(t, p.Refuse(false))
		connect(t, p).ask(t, "3")
	}
}

func TestAServerThatIsDownIsAReset(t *testing.T) {
	e := startEcho(t)
	p := newProxy(t, e.Addr().String())
	require.NoError(t, e.Close())
	conn, err := net.Dial("tcp", p.Addr())
	if err == nil { // or the reset was faster than Dial's look at the connection
		defer conn.Close()
		_, err = conn.Read(make([]byte, 1))
	}
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

func TestBlackholeIsSilentUntilHealed(t *testing.T) {
	for _, d := range []faultproxy.Direction{faultproxy.ToServer, faultproxy.ToClient, faultproxy.Both} {
		e := startEcho(t)
		p := newProxy(t, e.Addr().String())
		talker, sleeper := connect(t, p), connect(t, p)
		talker.ask(t, "1")
		sleeper.ask(t, "1")

		p.Blackhole(d)
		talker.say(t, "2")
		fresh := connect(t, p)
		fresh.say(t, "2")
		if d == faultproxy.ToClient {
			require.Eventually(t, func() bool { return e.lines.Load() == 4 }, soon, time.Millisecond)
		}
		talker.requireSilence(t)
		fresh.requireSilence(t)
		if d != faultproxy.ToClient {
			assert.EqualValues(t, 2, e.lines.Load())
		}

		require.NoError(t, p.Heal())
		talker.requireReset(t)
		fresh.requireReset(t)
		sleeper.ask(t, "3") // it has lost nothing
		assert.Equal(t, 2, p.Cuts())
	}
}

func TestBlackholeHidesTheEndOfAConnection(t *testing.T) {
	e := startEcho(t)
	p := newProxy(t, e.Addr().String())
	c := connect(t, p)
	c.ask(t, "1")
	p.Blackhole(faultproxy.ToClient)
	require.NoError(t, c.CloseWrite()) // the server answers with its own end, which vanishes
	c.requireSilence(t)

	require.NoError(t, e.Close())
	connect(t, p).requireSilence(t) // nor is there any sign that the server is down
	require.NoError(t, p.Heal())
	c.requireReset(t)
}

func TestDelayKeepsOrderAndThroughput(t *testing.T) {
	const d, n = 100 * time.Millisecond, 50
	p := newProxy(t, startEcho(t).Addr().String())
	c := connect(t, p)
	c.ask(t, "warm")
	p.Delay(d)
	began := time.Now()
	for i := range n {
		c.say(t, fmt.Sprint(i))
	}
	for i := range n {
		got, err := c.hear(soon)
		require.NoError(t, err)
		require.Equal(t, fmt.Sprint("re ", i), got)
	}
	assert.GreaterOrEqual(t, time.Since(began), 2*d)
	assert.Less(t, time.Since(began), n*d, "each line waited for the one before it")
	require.NoError(t, p.Heal())
	c.ask(t, "after")
	assert.Zero(t, p.Cuts())
}

func TestCutBeforeReply(t *testing.T) {
	e := startEcho(t)
	p := newProxy(t, e.Addr().String())
	other, c := connect(t, p), connect(t, p)
	cut := p.CutBeforeReply([]byte("SECRET"))
	c.ask(t, "harmless")
	other.ask(t, "harmless")

	// In pieces, for the proxy must find it across reads.
	for _, part := range []string{"a SE", "CR", "ET b\n"} {
		_, err := io.WriteString(c, part)
		require.NoError(t, err)
	}
	c.requireReset(t)
	<-cut
	assert.EqualValues(t, 3, e.lines.Load(), "the server must have executed it")
	assert.Equal(t, 1, p.Cuts())
	other.ask(t, "a SECRET b") // one call, one cut
}

func TestCutBeforeReplyFuncWaitsForTheReply(t *testing.T) {
	p := newProxy(t, startEcho(t).Addr().String())
	c := connect(t, p)
	cut := p.CutBeforeReplyFunc([]byte("two"), func(reply []byte) bool {
		return bytes.Contains(reply, []byte("re three"))
	})
	c.ask(t, "one")
	c.say(t, "two")
	c.requireSilence(t)
	c.say(t, "three")
	c.requireReset(t)
	<-cut
}

func TestCloseEndsEverything(t *testing.T) {
	p := newProxy(t, startEcho(t).Addr().String())
	c := connect(t, p)
	c.ask(t, "1")
	p.Delay(time.Hour)
	c.say(t, "2")
	p.Blackhole(faultproxy.Both)
	connect(t, p).say(t, "3")
	require.NoError(t, p.Close())
	require.NoError(t, p.Close())
	c.requireReset(t)
	require.ErrorIs(t, p.Heal(), net.ErrClosed)
	_, err := net.Dial("tcp", p.Addr())
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
}

// TestEverythingAtOnce is for the race detector.
func TestEverythingAtOnce(t *testing.T) {
	p := newProxy(t, startEcho(t).Addr().String())
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				conn, err := net.Dial("tcp", p.Addr())
				if err != nil {
					continue
				}
				c := &client{TCPConn: conn.(*net.TCPConn), r: bufio.NewReader(conn)}
				for range 10 {
					if _, err := io.WriteString(c, "hello\n"); err != nil {
						break
					}
					if _, err := c.hear(quiet); err != nil {
						break
					}
				}
				conn.Close()
			}
		})
	}
	for _, fault := range []func(){
		func() { p.Cut() },
		func() { p.Blackhole(faultproxy.ToServer) },
		func() { p.Blackhole(faultproxy.ToClient) },
		func() { p.Delay(time.Millisecond) },
		func() { assert.NoError(t, p.Refuse(true)) },
		func() { assert.NoError(t, p.Heal()) },
		func() { p.CutBeforeReply([]byte("hello")) },
		func() { _, _, _ = p.Connections(), p.Accepted(), p.Cuts() },
	} {
		wg.Go(func() {
			for ctx.Err() == nil {
				fault()
				select {
				case <-ctx.Done():
				case <-time.After(3 * time.Millisecond):
				}
			}
		})
	}
	wg.Wait()
}

// TestRedisReplyIsLostAndTheCommandWasExecuted shows what CutBeforeReply is for: a
// client that retries by itself executes twice.
func TestRedisReplyIsLostAndTheCommandWasExecuted(t *testing.T) {
	s := testserver.RedisForTest(t, testserver.RedisConfig{})
	p := newProxy(t, s.Addr())
	c := goredis.NewClient(&goredis.Options{Addr: p.Addr()})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	require.NoError(t, c.Ping(t.Context()).Err())

	cut := p.CutBeforeReply([]byte("counter"))
	n, err := c.Incr(t.Context(), "counter").Result()
	require.NoError(t, err)
	<-cut
	assert.EqualValues(t, 2, n)
}
