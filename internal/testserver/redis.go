package testserver

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// Persistence says what a Redis server keeps over its end.
type Persistence uint8

// The kinds of persistence.
const (
	// PersistNone keeps nothing, as a cache does.
	PersistNone Persistence = iota
	// AOFAlways syncs every write to the append-only file before it is answered.
	AOFAlways
)

// RedisConfig configures [StartRedis]. The zero value is a server without
// persistence that lets everybody in.
type RedisConfig struct {
	Persistence Persistence
	// Password is the default user's (requirepass).
	Password string
	// Users are ACL rules as in an ACL file, without the word "user":
	// "alice on >secret ~* &* +@all". "default off" locks the default user out.
	Users []string
	TLS   TLSMode
	// MaxMemory, such as "2mb", makes writes beyond it fail (noeviction).
	MaxMemory string
	// Config holds further lines of redis.conf. They win over those made here.
	Config []string
}

// A user of our own can always tell whether the server has finished loading; other
// users may be locked out, and Redis answers NOAUTH before LOADING.
const probeUser, probePassword = "testserver-probe", "probe"

// StartRedis starts a Redis server. ctx governs the start only; without a deadline
// the server has a minute to get ready.
func StartRedis(ctx context.Context, cfg RedisConfig) (*Server, error) {
	return one(startRedis(ctx, 1, cfg))
}

func startRedis(ctx context.Context, n int, cfg RedisConfig) ([]*Server, error) {
	binary, err := redisBinary()
	if err != nil {
		return nil, err
	}
	scheme := "redis"
	if cfg.TLS != NoTLS {
		scheme = "rediss"
	}
	return start(ctx, n, kind{
		name: "redis", binary: binary, ports: 1, scheme: scheme,
		args:  func(s *Server) ([]string, error) { return redisArgs(s, cfg) },
		ready: redisReady,
	}, cfg.TLS)
}

func redisBinary() (string, error) {
	name := os.Getenv("REDIS_SERVER")
	if name == "" {
		name = "redis-server"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("find redis-server: %w; install it (`make redis` does, or apt-get install redis-server,"+
			" brew install redis) or set REDIS_SERVER to the binary", err)
	}
	return path, nil
}

func redisArgs(s *Server, cfg RedisConfig) ([]string, error) {
	conf := []string{
		"bind 127.0.0.1",
		"daemonize no",
		"dir " + strconv.Quote(s.data()),
		`save ""`,
		"user " + probeUser + " on >" + probePassword + " +ping +info +cluster",
	}
	number := strconv.Itoa(s.port(0).Number())
	if s.identity == nil {
		conf = append(conf, "port "+number)
	} else {
		conf = append(conf, "port 0", "tls-port "+number,
			"tls-ca-cert-file "+strconv.Quote(s.identity.path(caFile)),
			"tls-cert-file "+strconv.Quote(s.identity.path(serverCertFile)),
			"tls-key-file "+strconv.Quote(s.identity.path(serverKeyFile)))
		if s.identity.mode == MutualTLS {
			conf = append(conf, "tls-auth-clients yes")
		} else {
			conf = append(conf, "tls-auth-clients no")
		}
	}
	if cfg.Persistence == AOFAlways {
		conf = append(conf, "appendonly yes", "appendfsync always")
	}
	if cfg.Password != "" {
		// Nodes that replicate one another have the same one.
		conf = append(conf, "requirepass "+strconv.Quote(cfg.Password), "masterauth "+strconv.Quote(cfg.Password))
	}
	for _, u := range cfg.Users {
		conf = append(conf, "user "+u)
	}
	if cfg.MaxMemory != "" {
		conf = append(conf, "maxmemory "+cfg.MaxMemory, "maxmemory-policy noeviction")
	}
	conf = append(conf, cfg.Config...)
	name := filepath.Join(s.dir, "redis.conf")
	return []string{name}, os.WriteFile(name, []byte(strings.Join(conf, "\n")+"\n"), 0o600)
}

func redisReady(ctx context.Context, s *Server) error {
	pong, err := redisDo(ctx, s, "PING")
	if err == nil && pong != "PONG" {
		err = fmt.Errorf("unexpected answer %q", pong)
	}
	return err
}

// redisDo runs one command whose words hold no spaces, and returns its reply, a string
// of either form. It speaks the protocol by itself, so that a test binary has only the
// client that it is a test of.
func redisDo(ctx context.Context, s *Server, words ...string) (string, error) {
	conn, err := dial(ctx, s)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	command := strings.Join(words, " ")
	if _, err := fmt.Fprintf(conn, "AUTH %s %s\r\n%s\r\n", probeUser, probePassword, command); err != nil {
		return "", err
	}
	r := bufio.NewReader(conn)
	if _, err := redisReply(r); err != nil {
		return "", err
	}
	reply, err := redisReply(r)
	if err != nil {
		return "", fmt.Errorf("%s: %w", words[0], err)
	}
	return reply, nil
}

func redisReply(r *bufio.Reader) (string, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return "", err
	}
	line = strings.TrimRight(line, "\r\n")
	switch {
	case strings.HasPrefix(line, "+"):
		return line[1:], nil
	case strings.HasPrefix(line, "$"):
		n, err := strconv.Atoi(line[1:])
		if err != nil || n < 0 {
			return "", fmt.Errorf("unexpected reply %q", line)
		}
		b := make([]byte, n+len("\r\n"))
		if _, err := io.ReadFull(r, b); err != nil {
			return "", err
		}
		return string(b[:n]), nil
	default:
		return "", errors.New(strings.TrimPrefix(line, "-"))
	}
}

// dial connects to the server, through TLS if it has that from the first byte on.
func dial(ctx context.Context, s *Server) (net.Conn, error) {
	var conn net.Conn
	var err error
	if s.identity != nil {
		conn, err = (&tls.Dialer{Config: s.TLS()}).DialContext(ctx, "tcp", s.Addr())
	} else {
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", s.Addr())
	}
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			conn.Close()
			return nil, err
		}
	}
	return conn, nil
}
